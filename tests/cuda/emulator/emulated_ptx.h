// What the instructions of csrc/cuda/device/ptx.cuh do, from the PTX manual (sections "cp.async", "ldmatrix", "Matrix
// Fragments for mma.m16n8k16 / mma.m16n8k8").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fastcnn::cuda {

inline unsigned char* dynamic_shared() {
  return emulator::shared_base();
}

// The emulator runs one kernel after the other.
inline void wait_for_earlier_kernels() {}
inline void let_next_kernel_begin() {}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulator::shared_base()) +
         emulator::shared_base_address();
}

inline void copy_async_16(uint32_t destination, const void* source, bool valid) {
  const emulator::Copy copy = {destination, source, valid};
  if (emulator::eager) {
    emulator::land(copy);
    emulator::current->unfenced = true;
  } else {
    emulator::current->copies.open.push_back(copy);
  }
}

inline void copy_async_commit() {
  auto& copies = emulator::current->copies;
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

template <int kPending>
void copy_async_wait() {
  auto& copies = emulator::current->copies;
  while (copies.groups.size() > kPending) {
    for (const auto& copy : copies.groups.front()) {
      emulator::land(copy);
      emulator::current->unfenced = true;
    }
    copies.groups.pop_front();
  }
}

inline void store_shared_16(uint32_t address, uint4 value) {
  std::memcpy(emulator::shared_pointer(address, 16), &value, 16);
  emulator::current->unfenced = true;
}

inline void load_matrix_x4(uint32_t (&d)[4], uint32_t address) {
  struct Argument {
    uint32_t* d;
    uint32_t address;
  } argument = {d, address};
  emulator::collective(emulator::Scope::warp, &argument, [](unsigned, const std::vector<void*>& arguments) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        // Lanes 8i..8i+7 hold the row addresses of matrix i; lane l receives two b16 values of row l / 4.
        const auto* row = static_cast<Argument*>(arguments[8 * matrix + lane / 4]);
        const unsigned char* from = emulator::shared_pointer(row->address, 16) + lane % 4 * 4;
        std::memcpy(&static_cast<Argument*>(arguments[lane])->d[matrix], from, 4);
      }
    }
  });
}

namespace emulated {

// Lane l has values (2 * (l % 4), l / 4) and (2 * (l % 4) + 1, l / 4) of each of four 8x8 matrices, whose rows lie
// where lanes 8i..8i+7 say for matrix i.
template <typename Word, typename Move>
void transposed_x4(Word* d, uint32_t address, Move move) {
  struct Argument {
    Word* d;
    uint32_t address;
    Move move;
  } argument = {d, address, move};
  emulator::collective(emulator::Scope::warp, &argument, [](unsigned, const std::vector<void*>& arguments) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        auto* mine = static_cast<Argument*>(arguments[lane]);
        for (int i = 0; i < 2; ++i) {
          const auto* row = static_cast<Argument*>(arguments[8 * matrix + lane % 4 * 2 + i]);
          mine->move(emulator::shared_pointer(row->address, 16) + lane / 4 * 2, &mine->d[matrix], i);
        }
      }
    }
  });
}

}  // namespace emulated

inline void load_matrix_transposed_x4(uint32_t (&d)[4], uint32_t address) {
  emulated::transposed_x4(d, address, [](const unsigned char* shared, uint32_t* word, int half) {
    std::memcpy(reinterpret_cast<unsigned char*>(word) + 2 * half, shared, 2);
  });
}
inline void store_matrix_transposed_x4(uint32_t address, const uint32_t (&d)[4]) {
  emulated::transposed_x4(d, address, [](unsigned char* shared, const uint32_t* word, int half) {
    std::memcpy(shared, reinterpret_cast<const unsigned char*>(word) + 2 * half, 2);
  });
  emulator::current->unfenced = true;
}

namespace emulated {

struct MmaArgument {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
float half_of(uint32_t word, int index);
template <>
inline float half_of<__nv_bfloat16>(uint32_t word, int index) {
  return __bfloat162float({static_cast<uint16_t>(word >> 16 * index)});
}
template <>
inline float half_of<__half>(uint32_t word, int index) {
  return __half2float({static_cast<uint16_t>(word >> 16 * index)});
}

inline void accumulate(const std::vector<void*>& arguments, const float (&a)[16][16], const float (&b)[16][8],
                       int depth) {
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane & 3;
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
      float sum = 0.0f;
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
      static_cast<MmaArgument*>(arguments[lane])->d[i] += sum;
    }
  }
}

}  // namespace emulated

template <typename T>
void mma_sync(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::MmaArgument argument = {d, a, {b0, b1}};
  emulator::collective(emulator::Scope::warp, &argument, [](unsigned, const std::vector<void*>& arguments) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* from = static_cast<emulated::MmaArgument*>(arguments[lane]);
      const int group = lane >> 2, in_group = lane & 3;
      if constexpr (sizeof(T) == 2) {  // m16n8k16
        for (int i = 0; i < 8; ++i) {
          const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
          const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
          a[row][column] = emulated::half_of<T>(from->a[i / 2], i % 2);
        }
        for (int i = 0; i < 4; ++i) {
          const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
          b[row][group] = emulated::half_of<T>(from->b[i / 2], i % 2);
        }
      } else {  // m16n8k8 tf32: the low 13 bits are not seen
        const auto value = [](uint32_t bits) {
          bits &= ~uint32_t{0x1fff};
          float x;
          std::memcpy(&x, &bits, 4);
          return x;
        };
        a[group][in_group] = value(from->a[0]);
        a[group + 8][in_group] = value(from->a[1]);
        a[group][in_group + 4] = value(from->a[2]);
        a[group + 8][in_group + 4] = value(from->a[3]);
        b[in_group][group] = value(from->b[0]);
        b[in_group + 4][group] = value(from->b[1]);
      }
    }
    emulated::accumulate(arguments, a, b, sizeof(T) == 2 ? 16 : 8);
  });
}

inline uint16_t rounded_bits(float x, __nv_bfloat16) {
  return __float2bfloat16_rn(x).bits;
}
inline uint16_t rounded_bits(float x, __half) {
  const __half rounded = __float2half_rn(x);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}

template <typename T, bool kRelu>
uint32_t round_pair(float low, float high) {
  const auto half = [](float x) { return uint32_t{rounded_bits(kRelu && x < 0.0f ? 0.0f : x, T())}; };
  return half(low) | half(high) << 16;
}

template <typename T>
uint32_t max_pair(uint32_t a, uint32_t b) {
  uint32_t larger = 0;
  for (int i = 0; i < 2; ++i) {
    const float x = emulated::half_of<T>(a, i), y = emulated::half_of<T>(b, i);
    larger |= uint32_t{rounded_bits(x != x || x > y ? x : y, T())} << 16 * i;
  }
  return larger;
}

// Nearest, ties away from zero.
inline uint32_t round_to_tf32(uint32_t bits) {
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~uint32_t{0x1fff};
}

}  // namespace fastcnn::cuda
