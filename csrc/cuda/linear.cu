// Fully connected layer: out[m, k] = act(sum_c input[m, c] * weight[k, c] + bias[k]).
//
// More than kFewRows rows: a 1x1 convolution over M pixels; conv2d's kernels serve it (tensor cores, or exact fp32).
// Few rows (inference): the weight is the traffic, and each of its values is used M times, too few for tensor cores to
//   matter. linear_few: a warp streams one or two rows of the weight, 16 bytes a lane, against all M inputs, which stay
//   in L1; partial sums are added by shuffles in a fixed order.
//   Registers: M x rows accumulators. Floor: weight once through DRAM.
#include "conv2d_choice.h"
#include "conv2d_problem.h"
#include "device/numeric.cuh"
#include "device/ptx.cuh"
#include "host.h"
#include "kernels.h"

namespace fastcnn::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kFewRows = 8;

struct LinearProblem {
  const void* input;
  const void* weight;
  void* out;
  int64_t input_stride, weight_stride, out_stride;
  int64_t rows, inputs, outputs;
  const float* bias;
  bool relu;
};

}  // namespace

// kRows: rows of the input, at least problem.rows. kOutputs: weight rows of a warp.
template <typename T, int kWidth, int kRows, int kOutputs>
__global__ void __launch_bounds__(32 * kWarps, 4) linear_few(const __grid_constant__ LinearProblem problem) {
  let_next_kernel_begin();
  wait_for_earlier_kernels();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kOutputs;
  if (first >= problem.outputs) return;
  const T* input = static_cast<const T*>(problem.input);
  const T* weight = static_cast<const T*>(problem.weight) + first * problem.weight_stride;

  float acc[kRows][kOutputs] = {};
#pragma unroll 2
  for (int64_t c = lane * kWidth; c < problem.inputs; c += 32 * kWidth) {
    float w[kOutputs][kWidth] = {};
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      if (first + k < problem.outputs) load<kWidth>(w[k], weight + k * problem.weight_stride + c);
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m >= problem.rows) continue;
      float x[kWidth];
      load<kWidth>(x, input + m * problem.input_stride + c);
#pragma unroll
      for (int k = 0; k < kOutputs; ++k) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) acc[m][k] += x[i] * w[k][i];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      float y = acc[m][k];
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) y += __shfl_xor_sync(0xffffffffu, y, distance);
      if (lane != 0 || m >= problem.rows || first + k >= problem.outputs) continue;
      if (problem.bias != nullptr) y += problem.bias[first + k];
      static_cast<T*>(problem.out)[m * problem.out_stride + first + k] = from_float<T>(problem.relu ? relu(y) : y);
    }
  }
}

namespace {

template <typename T, int kWidth>
void launch_few(const LinearProblem& problem, int device, void* stream) {
  const auto grid = [&](int outputs) {
    return dim3(static_cast<unsigned>(ceil_divide(problem.outputs, int64_t{kWarps} * outputs)));
  };
  if (problem.rows == 1) {
    launch_early<linear_few<T, kWidth, 1, 1>>("linear 1 row", device, grid(1), 32 * kWarps, 0, stream, problem);
  } else if (problem.rows <= 4) {
    launch_early<linear_few<T, kWidth, 4, 1>>("linear 4 rows", device, grid(1), 32 * kWarps, 0, stream, problem);
  } else {
    launch_early<linear_few<T, kWidth, kFewRows, 2>>("linear 8 rows", device, grid(2), 32 * kWarps, 0, stream, problem);
  }
}

void run_few(const LinearProblem& problem, DType dtype, bool vectors, int device, void* stream) {
  switch (dtype) {
    case DType::f32:
      return vectors ? launch_few<float, 4>(problem, device, stream) : launch_few<float, 1>(problem, device, stream);
    case DType::bf16:
      return vectors ? launch_few<__nv_bfloat16, 8>(problem, device, stream)
                     : launch_few<__nv_bfloat16, 1>(problem, device, stream);
    case DType::f16:
      return vectors ? launch_few<__half, 8>(problem, device, stream) : launch_few<__half, 1>(problem, device, stream);
  }
}

void run_as_conv2d(const TensorView& out, const TensorView& input, const TensorView& weight, const float* bias,
                   Activation activation, bool allow_tf32, const LaunchTarget& target) {
  const int64_t size = size_in_bytes(input.dtype);
  ConvProblem problem;
  ConvShape& shape = problem.shape;
  shape.reduction = shape.channels = static_cast<int32_t>(input.c);
  shape.filters = static_cast<int32_t>(out.c);
  shape.height = shape.width = 1;
  shape.pixel_stride = input.pixel_stride;
  shape.by_channels = FastDivisor(input.c);
  problem.weight = weight.data;
  problem.weight_row_stride = weight.pixel_stride;
  problem.relu = activation == Activation::relu;
  problem.vector_output = aligned_16(out) && out.c * size % 16 == 0;
  problem.bias = bias;
  problem.out_stride = out.pixel_stride;
  const EarlyStarts none(false);  // the weight is the caller's own, and may have been computed just now
  for (int64_t first = 0; first < input.n; first += kRowLimit - 1) {
    const int64_t count = input.n - first < kRowLimit - 1 ? input.n - first : kRowLimit - 1;
    shape.rows = static_cast<int32_t>(count);
    problem.input = static_cast<char*>(input.data) + first * input.pixel_stride * size;
    problem.out = static_cast<char*>(out.data) + first * out.pixel_stride * size;
    launch_conv2d(problem, input.dtype, allow_tf32, target);
  }
}

}  // namespace

void linear(const TensorView& out, const TensorView& input, const TensorView& weight, const float* bias,
            Activation activation, bool allow_tf32, int device, void* stream) {
  if (input.c >= kRowLimit || out.c >= kRowLimit) {
    throw std::invalid_argument("fastcnn CUDA linear: the numbers of features must be below 2^30");
  }
  const DeviceGuard guard(device);
  if (input.n > kFewRows) return run_as_conv2d(out, input, weight, bias, activation, allow_tf32, {device, stream});
  const LinearProblem problem = {input.data,
                                 weight.data,
                                 out.data,
                                 input.pixel_stride,
                                 weight.pixel_stride,
                                 out.pixel_stride,
                                 input.n,
                                 input.c,
                                 out.c,
                                 bias,
                                 activation == Activation::relu};
  const bool vectors = aligned_16(input) && aligned_16(weight) && input.c * size_in_bytes(input.dtype) % 16 == 0;
  run_few(problem, input.dtype, vectors, device, stream);
}

}  // namespace fastcnn::cuda
