// What the instructions of csrc/cuda/device/wgmma.cuh do, from the PTX manual ("Asynchronous Warpgroup Level Matrix
// Instructions": register fragments, shared-memory layouts and matrix descriptors for K-major operands).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FASTCNN_HAS_WGMMA 1

namespace fastcnn::cuda {

namespace emulated {

// Element (row, k) of a K-major operand: groups of eight rows, a stride apart. 128B swizzle: rows of 128 bytes, address
// bits 4-6 are xor-ed with bits 7-9. 64B swizzle: rows of 64 bytes, bits 4-5 with bits 7-8.
inline const unsigned char* operand(uint64_t descriptor, int row, int k) {
  const uint64_t mode = descriptor >> 62;
  if (mode != 1 && mode != 2) emulator::fail("wgmma descriptor: the swizzle is neither 128B nor 64B");
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  uint32_t address = start + row / 8 * stride + row % 8 * (mode == 1 ? 128 : 64) + k * 2;
  address ^= (address >> 7 & (mode == 1 ? 7 : 3)) << 4;
  return emulator::shared_pointer(address, 2);
}

inline const void* operand_of_row(const emulator::Product& product, const emulator::Product& holder, int row, int k) {
  if (holder.registers == nullptr) return operand(product.a, row, k);
  return reinterpret_cast<const uint16_t*>(&holder.registers[row % 16 / 8 + k / 8 * 2]) + k % 2;
}

inline void multiply(const std::vector<emulator::Product>& products) {  // one product, 128 threads
  const int columns = products[0].columns;
  static float a[64][16], b[128][16];
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 64; ++row) {
      // "Register fragment layout for wgmma.m64k16 matrix A": rows lane / 4 and 8 further, two values of k a register.
      const auto& holder = products[row / 16 * 32 + row % 8 * 4 + k % 8 / 2];
      const void* from = operand_of_row(products[0], holder, row, k);
      a[row][k] = products[0].element(from);
    }
    for (int row = 0; row < columns; ++row) b[row][k] = products[0].element(operand(products[0].b, row, k));
  }
  for (int thread = 0; thread < 128; ++thread) {
    if (products[thread].a != products[0].a || products[thread].b != products[0].b) {
      emulator::fail("wgmma descriptors differ within a warpgroup");
    }
    const int warp = thread / 32, lane = thread % 32;
    for (int i = 0; i < columns / 2; ++i) {
      const int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + lane % 4 * 2 + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      products[thread].d[i] += sum;
    }
  }
}

inline float bf16_element(const void* from) {
  __nv_bfloat16 value;
  std::memcpy(&value, from, 2);
  return __bfloat162float(value);
}
inline float f16_element(const void* from) {
  __half value;
  std::memcpy(&value, from, 2);
  return __half2float(value);
}
inline float (*element_of(__nv_bfloat16))(const void*) {
  return bf16_element;
}
inline float (*element_of(__half))(const void*) {
  return f16_element;
}

}  // namespace emulated

inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto& products = emulator::current->products;
  products.groups.push_back(std::move(products.open));
  products.open.clear();
}
inline void fence_async_proxy() {
  emulator::current->unfenced = false;
}
template <typename T, int kCount>
void hold(T (&)[kCount]) {}

template <int kPending>
void wgmma_wait() {
  emulator::collective(emulator::Scope::warpgroup, nullptr, [](unsigned first, const std::vector<void*>&) {
    const auto& threads = emulator::block().threads;
    while (threads[first]->products.groups.size() > kPending) {
      const size_t count = threads[first]->products.groups.front().size();
      for (size_t i = 0; i < count; ++i) {
        std::vector<emulator::Product> products;
        for (unsigned t = first; t < first + 128; ++t) {
          products.push_back(threads[t]->products.groups.front()[i]);
        }
        emulated::multiply(products);
      }
      for (unsigned t = first; t < first + 128; ++t) threads[t]->products.groups.pop_front();
    }
  });
}

namespace emulated {

inline void start(emulator::Product product) {
  if (!emulator::eager) {
    if (!emulator::block().fenced_at_barrier)
      emulator::fail("wgmma reads shared memory that was not fenced for the async proxy");
    emulator::current->products.open.push_back(product);
    return;
  }
  emulator::collective(emulator::Scope::warpgroup, &product, [](unsigned, const std::vector<void*>& arguments) {
    std::vector<emulator::Product> products;
    for (const void* argument : arguments) products.push_back(*static_cast<const emulator::Product*>(argument));
    emulated::multiply(products);
  });
}

}  // namespace emulated

template <typename T, int kColumns>
void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b) {
  emulated::start({d, kColumns, a, b, emulated::element_of(T())});
}
template <typename T, int kColumns>
void wgmma_registers(float (&d)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b) {
  emulated::start({d[0], kColumns, 0, b, emulated::element_of(T()), a});
}

}  // namespace fastcnn::cuda
