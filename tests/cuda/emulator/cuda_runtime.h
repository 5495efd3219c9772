// Stands in for CUDA's header: the part of the language and the runtime that the kernels use. See emulator.h.
#pragma once

#include <cmath>
#include <map>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block().index)
static const dim3& gridDim = emulator::grid_size;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline uint4 __ldca(const uint4* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) emulator::fail("misaligned 16-byte load");
  return *pointer;
}
inline float __ldca(const float* pointer) {
  return *pointer;
}
inline uint4 __ldcg(const uint4* pointer) {
  return __ldca(pointer);
}
inline void __stwb(uint4* pointer, uint4 value) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) emulator::fail("misaligned 16-byte store");
  *pointer = value;
}
inline float __powf(float x, float y) {
  return std::pow(x, y);
}
inline float __fdividef(float x, float y) {
  return x / y;
}

inline void __syncthreads() {
  emulator::collective(emulator::Scope::block, nullptr, [](unsigned, const std::vector<void*>&) {
    emulator::Block& block = emulator::block();
    block.fenced_at_barrier = true;
    for (const auto* thread : block.threads) block.fenced_at_barrier &= thread->done || !thread->unfenced;
  });
}
inline void __syncwarp() {
  emulator::collective(emulator::Scope::warp, nullptr, nullptr);
}

// Lane l receives the value of lane `source(l, distance)`, or keeps its own where that is none.
template <typename T>
T emulated_shuffle(unsigned mask, T value, int distance, int (*source)(int lane, int distance)) {
  if (mask != 0xffffffffu) emulator::fail("only full-warp shuffles are emulated");
  struct Argument {
    T in, out;
    int distance;
    int (*source)(int, int);
  } argument = {value, value, distance, source};
  emulator::collective(emulator::Scope::warp, &argument, [](unsigned, const std::vector<void*>& arguments) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* self = static_cast<Argument*>(arguments[lane]);
      const int from = self->source(lane, self->distance);
      if (from >= 0 && from < 32) self->out = static_cast<Argument*>(arguments[from])->in;
    }
  });
  return argument.out;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return emulated_shuffle(mask, value, distance, [](int lane, int by) { return lane ^ by; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  return emulated_shuffle(mask, value, distance, [](int lane, int by) { return lane - by; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  return emulated_shuffle(mask, value, distance, [](int lane, int by) { return lane + by; });
}

// The runtime. Device d has 2^(d % 16) multiprocessors; devices 0-15 are sm_80, 16-31 sm_90.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidClusterSize = 912
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
struct cudaDeviceProp {
  char name[16];
  int major, minor, multiProcessorCount, l2CacheSize;
  size_t totalGlobalMem, sharedMemPerBlockOptin;
};

inline const char* cudaGetErrorName(cudaError_t) {
  return "error";
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "from the emulator";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline int current_device = 0;
inline cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= 32) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 32;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= 32) return cudaErrorInvalidDevice;
  const bool hopper = device >= 16;
  *value = attribute == cudaDevAttrMultiProcessorCount            ? 1 << device % 16
           : attribute == cudaDevAttrComputeCapabilityMajor       ? 8 + hopper
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? (hopper ? 227 : 163) * 1024
                                                                  : 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
// Dynamic shared memory that a kernel may have on the current device.
inline int& opted_into(const void* kernel) {
  static std::map<std::pair<int, const void*>, int> bytes;
  return bytes.try_emplace({current_device, kernel}, 48 * 1024).first->second;
}
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  if (bytes > 227 * 1024) return cudaErrorInvalidValue;
  opted_into(reinterpret_cast<const void*>(kernel)) = bytes;
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const dim3 grid = config->gridDim;
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.x > 0x7fffffffu) return cudaErrorInvalidConfiguration;
  const auto most = static_cast<size_t>(opted_into(reinterpret_cast<const void*>(kernel)));
  if (config->blockDim.x > 1024 || config->dynamicSmemBytes > most) return cudaErrorInvalidValue;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& size = config->attrs[i].val.clusterDim;
    if (size.y != 1 || size.z != 1 || size.x == 0 || size.x > 8 || grid.x % size.x != 0) {
      return cudaErrorInvalidClusterSize;
    }
    cluster = size.x;
  }
  emulator::run_grid(grid, config->blockDim, cluster, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
