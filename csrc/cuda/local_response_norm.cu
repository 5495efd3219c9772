// Local response normalisation across channels (AlexNet), as torch.nn.functional.local_response_norm:
//
//   out[c] = x[c] / (k + alpha / size * sum_{j = c - size/2}^{c + (size-1)/2} x[j]^2) ^ beta,  x = 0 outside 0..C-1
//
// Layout: (pixels, C) with a pixel stride each; pixels are independent.
// Work: a block takes a few pixels, lays their squares down in shared memory as fp32, and sums each window from there;
//   x itself, 16 bytes a thread where aligned, is read again from L1. A pixel of more than 8192 channels does not fit:
//   the same kernel then squares its neighbours straight from global memory (kShared = false).
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

}  // namespace

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
