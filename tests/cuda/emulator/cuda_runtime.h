// Stands in for CUDA's header: the part of the language and the runtime that the kernels use. See emulator.h.
#pragma once

#include <cmath>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulator::current->index)
static const dim3& blockIdx = emulator::block_index;
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
    emulator::fenced_at_barrier = true;
    for (const auto* thread : emulator::threads) emulator::fenced_at_barrier &= thread->done || !thread->unfenced;
  });
}
inline void __syncwarp() {
  emulator::collective(emulator::Scope::warp, nullptr, nullptr);
}

inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
  if (mask != 0xffffffffu) emulator::fail("only full-warp shuffles are emulated");
  struct Argument {
    float in, out;
    int distance;
  } argument = {value, 0.0f, distance};
  emulator::collective(emulator::Scope::warp, &argument, [](unsigned, const std::vector<void*>& arguments) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* self = static_cast<Argument*>(arguments[lane]);
      self->out = static_cast<Argument*>(arguments[lane ^ self->distance])->in;
    }
  });
  return argument.out;
}

// The runtime. Device d has 2^(d % 16) multiprocessors; devices 0-15 are sm_80, 16-31 sm_90.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
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
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
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
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidConfiguration;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const dim3 grid = config->gridDim;
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.x > 0x7fffffffu) return cudaErrorInvalidConfiguration;
  if (config->blockDim.x > 1024 || config->dynamicSmemBytes > 227 * 1024) return cudaErrorInvalidConfiguration;
  emulator::run_grid(grid, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
