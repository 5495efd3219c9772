// Batch norm's training statistics: mean[c] = sum x / M and variance[c] = sum (x - mean[c])^2 / M over M = N*H*W
// pixels.
//
// One pass over the input, without the cancellation of sum(x^2) - mean^2: every partial result is a mean and a sum of
// squared deviations from it (Welford 1962), and two of them are merged exactly (Chan, Golub and LeVeque 1983).
// Stage 1: the pixels are cut into slabs, equal for every channel; a block takes one slab and a strip of channels. A
//   thread keeps one chunk of channels (16 bytes where aligned) in registers and walks its slab; the block's rows are
//   merged in shared memory. Result: (mean, m2) per slab and channel, in the workspace.
// Stage 2: eight rows of threads each merge every eighth slab of a channel, then the eight are merged.
// All orders are fixed and depend on the shape alone: results repeat bit for bit on every device.
// Floor: the input once through DRAM.
#include <algorithm>

#include "device/numeric.cuh"
#include "device/ptx.cuh"
#include "host.h"
#include "kernels.h"

namespace fastcnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;  // chunks of a strip, at most
constexpr int64_t kMostSlabs = 512;
constexpr int64_t kPixelsPerThread = 32;  // at least, before another slab is opened

struct StatisticsProblem {
  const void* input;
  int64_t stride, pixels, channels;
  int64_t slabs;
  float* workspace;  // mean[slab][channel], then m2[slab][channel]
  float* mean;
  float* variance;
};

__device__ __forceinline__ int64_t slab_begin(const StatisticsProblem& problem, int64_t slab) {
  const int64_t each = problem.pixels / problem.slabs, rest = problem.pixels - each * problem.slabs;
  return slab * each + (slab < rest ? slab : rest);
}

// Count, mean and sum of squared deviations of a set of values.
struct Moments {
  float count = 0.0f, mean = 0.0f, m2 = 0.0f;
};

__device__ __forceinline__ void merge(Moments& a, const Moments& b) {
  if (b.count == 0.0f) return;
  const float count = a.count + b.count;
  const float delta = b.mean - a.mean;
  const float share = b.count * reciprocal(count);
  a.mean += delta * share;
  a.m2 += b.m2 + delta * delta * (a.count * share);
  a.count = count;
}

}  // namespace

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    batch_statistics_slabs(const __grid_constant__ StatisticsProblem problem, int lanes) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes, lane_row = thread / lanes, rows = kThreads / lanes;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * kWidth;
  const int64_t slab = blockIdx.x;
  const bool active = lane_row < rows && c < problem.channels;

  float count = 0.0f, mean[kWidth] = {}, m2[kWidth] = {};
  if (active) {
    const int64_t end = slab_begin(problem, slab + 1);
    int64_t pixel = slab_begin(problem, slab) + lane_row;
    const T* at = static_cast<const T*>(problem.input) + pixel * problem.stride + c;
#pragma unroll 4
    for (; pixel < end; pixel += rows, at += rows * problem.stride) {
      float x[kWidth];
      load<kWidth>(x, at);
      count += 1.0f;
      const float inverse = reciprocal(count);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float delta = x[i] - mean[i];
        mean[i] += delta * inverse;
        m2[i] += delta * (x[i] - mean[i]);
      }
    }
  }
  // Merge the rows, one channel of the chunk at a time so that any chunk fits in the same shared memory.
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // count, mean, m2 of each thread
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    shared[thread] = count;
    shared[kThreads + thread] = mean[i];
    shared[2 * kThreads + thread] = m2[i];
    __syncthreads();
    if (active && lane_row == 0) {
      Moments total = {count, mean[i], m2[i]};
      for (int row = 1; row < rows; ++row) {
        const int other = row * lanes + lane;
        merge(total, {shared[other], shared[kThreads + other], shared[2 * kThreads + other]});
      }
      problem.workspace[slab * problem.channels + c + i] = total.mean;
      problem.workspace[(problem.slabs + slab) * problem.channels + c + i] = total.m2;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) batch_statistics_merge(const __grid_constant__ StatisticsProblem problem) {
  constexpr int kRows = kThreads / kLanes;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kLanes, row = thread / kLanes;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  Moments total;
  if (c < problem.channels) {
    for (int64_t slab = row; slab < problem.slabs; slab += kRows) {
      const float count = static_cast<float>(slab_begin(problem, slab + 1) - slab_begin(problem, slab));
      merge(total, {count, problem.workspace[slab * problem.channels + c],
                    problem.workspace[(problem.slabs + slab) * problem.channels + c]});
    }
  }
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[thread] = total.count;
  shared[kThreads + thread] = total.mean;
  shared[2 * kThreads + thread] = total.m2;
  __syncthreads();
  if (row != 0 || c >= problem.channels) return;
  for (int other = thread + kLanes; other < kThreads; other += kLanes) {
    merge(total, {shared[other], shared[kThreads + other], shared[2 * kThreads + other]});
  }
  problem.mean[c] = total.mean;
  problem.variance[c] = total.m2 / static_cast<float>(problem.pixels);
}

namespace {

// Slabs long enough to be worth a merge, and enough of them to fill a large GPU. Must not depend on alignment: the
// workspace is sized before the kernel is chosen.
int64_t slab_count(const TensorView& input) {
  const int64_t chunks = ceil_divide(input.c, 16 / size_in_bytes(input.dtype));
  const int64_t rows = kThreads / std::min<int64_t>(chunks, kLanes);
  return std::clamp(input.pixels() / (rows * kPixelsPerThread), int64_t{1}, kMostSlabs);
}

template <typename T, int kWidth>
void launch_statistics(const StatisticsProblem& problem, int device, void* stream) {
  const int64_t chunks = problem.channels / kWidth;
  const int lanes = static_cast<int>(std::min<int64_t>(chunks, kLanes));
  const dim3 grid(static_cast<unsigned>(problem.slabs), static_cast<unsigned>(ceil_divide(chunks, lanes)));
  constexpr size_t kSharedBytes = 3 * kThreads * sizeof(float);
  launch<batch_statistics_slabs<T, kWidth>>("batch_statistics", device, grid, kThreads, kSharedBytes, stream, problem,
                                            lanes);
  const dim3 merge_grid(static_cast<unsigned>(ceil_divide(problem.channels, kLanes)));
  launch<batch_statistics_merge>("batch_statistics merge", device, merge_grid, kThreads, kSharedBytes, stream, problem);
}

}  // namespace

size_t batch_statistics_workspace_bytes(const TensorView& input) {
  return static_cast<size_t>(2 * slab_count(input) * input.c) * sizeof(float);
}

void batch_statistics(float* mean, float* variance, const TensorView& input, float* workspace, int device,
                      void* stream) {
  const DeviceGuard guard(device);
  const StatisticsProblem problem = {input.data,        input.pixel_stride, input.pixels(), input.c,
                                     slab_count(input), workspace,          mean,           variance};
  const bool vectors = aligned_16(input) && input.c * size_in_bytes(input.dtype) % 16 == 0;
  switch (input.dtype) {
    case DType::f32:
      return vectors ? launch_statistics<float, 4>(problem, device, stream)
                     : launch_statistics<float, 1>(problem, device, stream);
    case DType::bf16:
      return vectors ? launch_statistics<__nv_bfloat16, 8>(problem, device, stream)
                     : launch_statistics<__nv_bfloat16, 1>(problem, device, stream);
    case DType::f16:
      return vectors ? launch_statistics<__half, 8>(problem, device, stream)
                     : launch_statistics<__half, 1>(problem, device, stream);
  }
}

}  // namespace fastcnn::cuda
