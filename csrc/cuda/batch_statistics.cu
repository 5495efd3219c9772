// Batch norm's training statistics: mean[c] = sum x / M and variance[c] = sum (x - mean[c])^2 / M over M = N*H*W
// pixels.
//
// One pass over the input, without the cancellation of sum(x^2) - mean^2: every partial result is a mean and a sum of
// squared deviations from it (Welford 1962), and two of them are merged exactly (Chan, Golub and LeVeque 1983).
// Stage 1: the pixels are cut into slabs, equal for every channel; a block takes one slab and a strip of channels. A
//   thread keeps one chunk of channels (16 bytes where aligned) in registers and walks its slab, four pixels in flight
//   before the first is converted. The block's rows are merged in shared memory, by as many threads for each channel as
//   there are, then those. Result: (mean, m2) per slab and channel, in the workspace.
// Stage 2: 32 rows of threads each merge every 32nd slab of a channel, then pairs of rows until one is left.
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
constexpr int kUnroll = 4;
constexpr int kMergeLanes = 8;  // channels of a block of stage 2
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

// Slabs of equal size, the first ones of one pixel more.
struct Slabs {
  int64_t each, rest;
  __device__ __forceinline__ explicit Slabs(const StatisticsProblem& problem) : each(problem.pixels / problem.slabs) {
    rest = problem.pixels - each * problem.slabs;
  }
  __device__ __forceinline__ int64_t size(int64_t slab) const { return each + (slab < rest ? 1 : 0); }
  __device__ __forceinline__ int64_t begin(int64_t slab) const { return slab * each + (slab < rest ? slab : rest); }
};

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
__global__ void __launch_bounds__(kThreads, 4)
    batch_statistics_slabs(const __grid_constant__ StatisticsProblem problem, int lanes) {
  constexpr int kPitch = kThreads + 1;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes, lane_row = thread / lanes, rows = kThreads / lanes;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.y) * lanes * kWidth, c = first_channel + lane * kWidth;
  const int64_t slab = blockIdx.x;

  float count = 0.0f, mean[kWidth] = {}, m2[kWidth] = {};
  const auto add = [&](const Raw<kWidth, T>& raw) {
    float x[kWidth];
    convert(x, raw);
    count += 1.0f;
    const float inverse = reciprocal(count);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float delta = x[i] - mean[i];
      mean[i] += delta * inverse;
      m2[i] += delta * (x[i] - mean[i]);
    }
  };
  if (lane_row < rows && c < problem.channels) {
    const Slabs slabs(problem);
    const int64_t begin = slabs.begin(slab), stride = rows * problem.stride;
    int64_t left = (slabs.size(slab) - lane_row + rows - 1) / rows;  // pixels of this thread
    const T* at = static_cast<const T*>(problem.input) + (begin + lane_row) * problem.stride + c;
    for (; left >= kUnroll; left -= kUnroll, at += kUnroll * stride) {
      Raw<kWidth, T> raw[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) raw[u] = load_raw<kWidth>(at + u * stride);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) add(raw[u]);
    }
    for (; left > 0; --left, at += stride) add(load_raw<kWidth>(at));
  }
  // All rows of a channel, from [i][thread] in shared memory: `parts` threads take every parts-th row.
  float* counts = reinterpret_cast<float*>(dynamic_shared());
  float* means = counts + kThreads;
  float* m2s = means + kWidth * kPitch;
  counts[thread] = count;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    means[i * kPitch + thread] = mean[i];
    m2s[i * kPitch + thread] = m2[i];
  }
  __syncthreads();
  const int channels = lanes * kWidth, parts = kThreads / channels;
  const int channel = thread % channels, part = thread / channels;
  const int source = channel / kWidth, from = channel % kWidth * kPitch;
  Moments total;
  if (part < parts) {
    for (int row = part; row < rows; row += parts) {
      const int other = row * lanes + source;
      merge(total, {counts[other], means[from + other], m2s[from + other]});
    }
  }
  __syncthreads();
  counts[thread] = total.count;
  means[thread] = total.mean;
  m2s[thread] = total.m2;
  __syncthreads();
  if (part != 0 || first_channel + channel >= problem.channels) return;
  for (int other = thread + channels; other < parts * channels; other += channels) {
    merge(total, {counts[other], means[other], m2s[other]});
  }
  problem.workspace[slab * problem.channels + first_channel + channel] = total.mean;
  problem.workspace[(problem.slabs + slab) * problem.channels + first_channel + channel] = total.m2;
}

__global__ void __launch_bounds__(kThreads) batch_statistics_merge(const __grid_constant__ StatisticsProblem problem) {
  constexpr int kRows = kThreads / kMergeLanes;
  const int thread = static_cast<int>(threadIdx.x), row = thread / kMergeLanes;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kMergeLanes + thread % kMergeLanes;
  Moments total;
  if (c < problem.channels) {
    const Slabs slabs(problem);
    const float* means = problem.workspace + c;
    const float* m2s = means + problem.slabs * problem.channels;
    for (int64_t first = row; first < problem.slabs; first += kUnroll * kRows) {
      float mean[kUnroll] = {}, m2[kUnroll] = {};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t slab = first + u * kRows;
        if (slab < problem.slabs) {
          mean[u] = means[slab * problem.channels];
          m2[u] = m2s[slab * problem.channels];
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t slab = first + u * kRows;
        if (slab < problem.slabs) merge(total, {static_cast<float>(slabs.size(slab)), mean[u], m2[u]});
      }
    }
  }
  float* counts = reinterpret_cast<float*>(dynamic_shared());
  float* means = counts + kThreads;
  float* m2s = means + kThreads;
  for (int half = kRows / 2; half > 0; half /= 2) {
    counts[thread] = total.count;
    means[thread] = total.mean;
    m2s[thread] = total.m2;
    __syncthreads();
    const int other = thread + half * kMergeLanes;
    if (row < half) merge(total, {counts[other], means[other], m2s[other]});
    __syncthreads();
  }
  if (row != 0 || c >= problem.channels) return;
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
  constexpr size_t kSharedBytes = (kThreads + 2 * kWidth * (kThreads + 1)) * sizeof(float);
  launch<batch_statistics_slabs<T, kWidth>>("batch_statistics", device, grid, kThreads, kSharedBytes, stream, problem,
                                            lanes);
  const dim3 merge_grid(static_cast<unsigned>(ceil_divide(problem.channels, kMergeLanes)));
  launch<batch_statistics_merge>("batch_statistics merge", device, merge_grid, kThreads, 3 * kThreads * sizeof(float),
                                 stream, problem);
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
