// Host side of every launch: the device guard, error reporting, and a launcher that never synchronises or allocates.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "../common/types.h"

namespace fastcnn::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // leave no error behind for the next caller to trip over
  throw std::runtime_error(std::string("fastcnn CUDA: ") + what + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (previous_ != device_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = -1;
};

// Facts the dispatchers need, read once per device.
struct DeviceFacts {
  int multiprocessors = 1;
  int shared_bytes = 48 * 1024;  // that a block may opt into
  bool wgmma = false;            // the device is sm_90, and this build holds code for sm_90a
};
DeviceFacts device_facts(int device);

// Launches kKernel on `stream` of the current device. A kernel that wants more than 48 KiB of dynamic shared memory
// opts into all a block may have, once per device.
template <auto kKernel, typename... Args>
void launch(const char* name, int device, dim3 grid, int threads, size_t shared_bytes, void* stream,
            const Args&... args) {
  if (shared_bytes > 48 * 1024) {
    static std::atomic<uint64_t> configured{0};
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if ((configured.load(std::memory_order_relaxed) & bit) == 0) {
      const int most = device_facts(device).shared_bytes;
      check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
      configured.fetch_or(bit, std::memory_order_relaxed);
    }
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kKernel, args...), name);
}

inline bool aligned_16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Every pixel of the view starts on a 16-byte boundary.
inline bool aligned_16(const TensorView& view) {
  return aligned_16(view.data) && view.pixel_stride * size_in_bytes(view.dtype) % 16 == 0;
}

inline int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename T>
T* offset_by(void* data, int64_t elements) {
  return static_cast<T*>(data) + elements;
}

}  // namespace fastcnn::cuda
