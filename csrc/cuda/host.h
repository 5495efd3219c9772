// Host side of every launch: the device guard, error reporting, and a launcher that never synchronises or allocates.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
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

// Lets kKernel have `bytes` of dynamic shared memory on `device`, where that is more than the 48 KiB that every kernel
// has. It asks for what launches have used so far and for no more: tools that need some of a block's shared memory
// themselves find the rest free. The limit only grows, so that two threads do not lower it for each other.
template <auto kKernel>
void opt_into_shared_memory(const char* name, int device, size_t bytes) {
  constexpr int kCached = 64;
  static std::array<std::atomic<size_t>, kCached> granted{};
  static std::mutex mutex;
  if (bytes <= 48 * 1024) return;
  const bool cached = device >= 0 && device < kCached;
  if (cached && bytes <= granted[device].load(std::memory_order_acquire)) return;
  const std::lock_guard<std::mutex> lock(mutex);
  if (cached && bytes <= granted[device].load(std::memory_order_relaxed)) return;
  const size_t asked = cached ? bytes : static_cast<size_t>(device_facts(device).shared_bytes);
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(asked)), name);
  if (cached) granted[device].store(bytes, std::memory_order_release);
}

// Whether kernels that this thread launches may begin before the one ahead of them in their stream has ended. On only
// while a frozen model is captured whose weights are constants: kernels fetch weights before they wait for that one.
inline bool& early_starts() {
  static thread_local bool on = false;
  return on;
}

// Sets early_starts for a scope.
class EarlyStarts {
 public:
  explicit EarlyStarts(bool on) : before_(std::exchange(early_starts(), on)) {}
  ~EarlyStarts() { early_starts() = before_; }
  EarlyStarts(const EarlyStarts&) = delete;
  EarlyStarts& operator=(const EarlyStarts&) = delete;

 private:
  bool before_;
};

// Launches kKernel on `stream` of the current device. `cluster` neighbouring blocks of the grid form a cluster (sm_90).
// kEarly: the kernel calls wait_for_earlier_kernels() (device/ptx.cuh), so that it may begin early.
template <auto kKernel, bool kEarly, typename... Args>
void launch_kernel(const char* name, int device, dim3 grid, int cluster, int threads, size_t shared_bytes, void* stream,
                   const Args&... args) {
  opt_into_shared_memory<kKernel>(name, device, shared_bytes);
  std::array<cudaLaunchAttribute, 2> attributes = {};
  unsigned count = 0;
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[count++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  if (kEarly && early_starts()) {
    cudaLaunchAttribute& attribute = attributes[count++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes.data();
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kKernel, args...), name);
}

template <auto kKernel, typename... Args>
void launch(const char* name, int device, dim3 grid, int threads, size_t shared_bytes, void* stream,
            const Args&... args) {
  launch_kernel<kKernel, false>(name, device, grid, 1, threads, shared_bytes, stream, args...);
}

template <auto kKernel, typename... Args>
void launch_early(const char* name, int device, dim3 grid, int threads, size_t shared_bytes, void* stream,
                  const Args&... args) {
  launch_kernel<kKernel, true>(name, device, grid, 1, threads, shared_bytes, stream, args...);
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
