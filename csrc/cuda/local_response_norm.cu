// Local response normalisation across channels (AlexNet), as torch.nn.functional.local_response_norm:
//
//   out[c] = x[c] / (k + alpha / size * sum_{j = c - size/2}^{c + (size-1)/2} x[j]^2) ^ beta,  x = 0 outside 0..C-1
//
// Layout: (pixels, C) with a pixel stride each; pixels are independent.
// Work, windows of 5 channels (the published networks') and aligned tensors: a thread takes 16 bytes of four pixels,
// all
//   in flight together, and has the two channels on either side from its neighbours in the warp by shuffles; the first
//   and the last lane load theirs. Nothing passes through shared memory.
// Work, the rest: a block takes a few pixels, lays their squares down in shared memory as fp32, and sums each window
//   from there; x itself, 16 bytes a thread where aligned, is read again from L1. A pixel of more than 8192 channels
//   does not fit: the same kernel then squares its neighbours straight from global memory (kShared = false).
// Floor: input and output once through DRAM.
#include <algorithm>

#include "device/numeric.cuh"
#include "device/ptx.cuh"
#include "host.h"
#include "kernels.h"

namespace fastcnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSharedFloats = 8192;

struct NormProblem {
  const void* input;
  void* out;
  int64_t input_stride, out_stride, pixels, channels;
  int64_t before, after;  // channels of the window on either side of c
  float alpha_over_size, beta, k;
};

// s ^ -beta. s = 0 gives inf for beta > 0, as the division would.
template <typename T>
__device__ __forceinline__ float negative_power(float s, float beta) {
  if constexpr (sizeof(T) == 4) {
    return powf(s, -beta);
  } else {
    return __powf(s, -beta);
  }
}

constexpr int kReach = 2, kUnroll = 4;  // of local_response_norm_of_5

}  // namespace

// A block is `lanes` chunks, all of a pixel's, by kThreads / lanes pixels.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    local_response_norm_of_5(const __grid_constant__ NormProblem problem, int lanes) {
  constexpr int kWidth = kVector<T>, kWords = kReach * sizeof(T) / 4;  // of 32 bits in the reach
  const int thread = static_cast<int>(threadIdx.x), in_warp = thread % 32;
  const int lane = thread % lanes, lane_row = thread / lanes, rows = kThreads / lanes;
  const bool left = lane > 0, right = lane + 1 < lanes;  // whether there are channels before and behind
  const bool alone = (in_warp == 0 && left) || (in_warp == 31 && right);  // the neighbour is in another warp
  const int64_t c = static_cast<int64_t>(lane) * kWidth, edge_c = in_warp == 0 ? c - kReach : c + kWidth;
  const int64_t tile = static_cast<int64_t>(rows) * kUnroll, step = tile * gridDim.x;
  for (int64_t first = tile * blockIdx.x; first < problem.pixels; first += step) {
    Raw<kWidth, T> raw[kUnroll] = {};
    uint32_t edge[kUnroll][kWords] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t pixel = first + u * rows + lane_row;
      if (lane_row < rows && pixel < problem.pixels) {
        const T* input = static_cast<const T*>(problem.input) + pixel * problem.input_stride;
        raw[u] = load_raw<kWidth>(input + c);
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          if (alone) edge[u][i] = __ldg(reinterpret_cast<const uint32_t*>(input + edge_c) + i);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      uint32_t words[4], around[2][kWords];  // the reach before and behind
      memcpy(words, &raw[u].bits, 16);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        around[0][i] = __shfl_up_sync(0xffffffffu, words[4 - kWords + i], 1);
        around[1][i] = __shfl_down_sync(0xffffffffu, words[i], 1);
        if (in_warp == 0) around[0][i] = edge[u][i];
        if (in_warp == 31) around[1][i] = edge[u][i];
        if (!left) around[0][i] = 0;
        if (!right) around[1][i] = 0;
      }
      const int64_t pixel = first + u * rows + lane_row;
      if (lane_row >= rows || pixel >= problem.pixels) continue;
      T near[2 * kReach];
      memcpy(near, around, sizeof(near));
      float x[kWidth], squares[kWidth + 2 * kReach];
      convert(x, raw[u]);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) squares[kReach + i] = x[i] * x[i];
#pragma unroll
      for (int i = 0; i < kReach; ++i) {
        const float before = to_float(near[i]), behind = to_float(near[kReach + i]);
        squares[i] = before * before;
        squares[kReach + kWidth + i] = behind * behind;
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        float sum = squares[i];
#pragma unroll
        for (int j = 1; j <= 2 * kReach; ++j) sum += squares[i + j];
        x[i] *= negative_power<T>(problem.k + problem.alpha_over_size * sum, problem.beta);
      }
      store<kWidth>(static_cast<T*>(problem.out) + pixel * problem.out_stride + c, x);
    }
  }
}

// A block holds `rows` pixels at a time, as [row][channel].
template <typename T, int kWidth, bool kShared>
__global__ void __launch_bounds__(kThreads)
    local_response_norm_kernel(const __grid_constant__ NormProblem problem, int rows) {
  float* squares = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t chunks = problem.channels / kWidth;
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows; first < problem.pixels; first += step) {
    const int64_t here = problem.pixels - first < rows ? problem.pixels - first : rows;
    if constexpr (kShared) {
      for (int i = thread; i < static_cast<int>(here * chunks); i += kThreads) {
        const int row = i / static_cast<int>(chunks);
        const int c = (i - row * static_cast<int>(chunks)) * kWidth;
        float x[kWidth];
        load<kWidth>(x, static_cast<const T*>(problem.input) + (first + row) * problem.input_stride + c);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) squares[row * problem.channels + c + j] = x[j] * x[j];
      }
      __syncthreads();
    }
    for (int64_t i = thread; i < here * chunks; i += kThreads) {
      const int64_t row = kShared ? static_cast<int>(i) / static_cast<int>(chunks) : i / chunks;
      const int64_t c = (i - row * chunks) * kWidth;
      const T* input = static_cast<const T*>(problem.input) + (first + row) * problem.input_stride;
      float x[kWidth];
      load<kWidth>(x, input + c);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int64_t begin = c + j - problem.before < 0 ? 0 : c + j - problem.before;
        const int64_t end = c + j + problem.after + 1 > problem.channels ? problem.channels : c + j + problem.after + 1;
        float sum = 0.0f;
        for (int64_t at = begin; at < end; ++at) {
          if constexpr (kShared) {
            sum += squares[row * problem.channels + at];
          } else {
            const float value = to_float(input[at]);
            sum += value * value;
          }
        }
        x[j] *= negative_power<T>(problem.k + problem.alpha_over_size * sum, problem.beta);
      }
      store<kWidth>(static_cast<T*>(problem.out) + (first + row) * problem.out_stride + c, x);
    }
    if constexpr (kShared) __syncthreads();
  }
}

namespace {

template <typename T, int kWidth>
void launch_norm(const NormProblem& problem, int device, void* stream) {
  constexpr char kName[] = "local_response_norm";
  if constexpr (kWidth > 1) {
    const int64_t chunks = problem.channels / kWidth;
    if (problem.before == kReach && problem.after == kReach && chunks <= kThreads) {
      const int64_t available = ceil_divide(problem.pixels, kThreads / chunks * kUnroll);
      const int64_t blocks = std::min(available, int64_t{16} * device_facts(device).multiprocessors);
      launch<local_response_norm_of_5<T>>(kName, device, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream,
                                          problem, static_cast<int>(chunks));
      return;
    }
  }
  const bool shared = problem.channels <= kSharedFloats;
  // Two chunks for every thread, so that loads overlap; no more rows than shared memory holds.
  const int64_t wanted_rows = std::max<int64_t>(1, 2 * kThreads * kWidth / problem.channels);
  const int64_t rows = shared ? std::min(wanted_rows, kSharedFloats / problem.channels) : 1;
  const int64_t blocks =
      std::min(ceil_divide(problem.pixels, rows), int64_t{16} * device_facts(device).multiprocessors);
  const dim3 grid(static_cast<unsigned>(blocks));
  if (shared) {
    launch<local_response_norm_kernel<T, kWidth, true>>(kName, device, grid, kThreads,
                                                        static_cast<size_t>(rows * problem.channels) * sizeof(float),
                                                        stream, problem, static_cast<int>(rows));
  } else {
    launch<local_response_norm_kernel<T, kWidth, false>>(kName, device, grid, kThreads, 0, stream, problem,
                                                         static_cast<int>(rows));
  }
}

}  // namespace

void local_response_norm(const TensorView& out, const TensorView& input, int64_t size, float alpha, float beta, float k,
                         int device, void* stream) {
  const DeviceGuard guard(device);
  const NormProblem problem = {input.data,
                               out.data,
                               input.pixel_stride,
                               out.pixel_stride,
                               input.pixels(),
                               input.c,
                               size / 2,
                               (size - 1) / 2,
                               alpha / static_cast<float>(size),
                               beta,
                               k};
  const bool vectors = aligned_16(input) && aligned_16(out) && input.c * size_in_bytes(input.dtype) % 16 == 0;
  switch (input.dtype) {
    case DType::f32:
      return vectors ? launch_norm<float, 4>(problem, device, stream) : launch_norm<float, 1>(problem, device, stream);
    case DType::bf16:
      return vectors ? launch_norm<__nv_bfloat16, 8>(problem, device, stream)
                     : launch_norm<__nv_bfloat16, 1>(problem, device, stream);
    case DType::f16:
      return vectors ? launch_norm<__half, 8>(problem, device, stream)
                     : launch_norm<__half, 1>(problem, device, stream);
  }
}

}  // namespace fastcnn::cuda
