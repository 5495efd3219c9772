// Convolution with few channels per group, on CUDA cores: a tensor-core tile would be mostly zeros.
//
//   out[m, k] = act(sum_{r,s,c} pro(input)[n, h, w, g*C/g + c] * weight[k, r, s, c] * scale[k] + bias[k] + residual[m,
//   k])
//
// conv2d_depthwise: C/g = 1 and K = groups. A thread owns 16 bytes of channels and computes one pixel after another; a
//   block's filters lie in shared memory as fp32, tap-major, so that a warp reads them without conflicts.
//   Shared memory: R*S x block's channels. Floor: input and output once through DRAM (taps are reread from L1 and L2).
// conv2d_grouped: any small C/g, any alignment. A thread owns one filter and four neighbouring pixels, so that each
//   weight is used four times; a warp's lanes hold neighbouring filters, whose inputs and outputs are neighbours too.
//   Floor: as above while R*S*C/g stays small; otherwise 2*N*P*Q*K*R*S*C/g operations on the FMA pipes.
#include "conv2d_problem.h"
#include "device/conv_index.h"
#include "device/numeric.cuh"
#include "device/ptx.cuh"
#include "host.h"

namespace fastcnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 4;                       // per thread, conv2d_grouped
constexpr int kDepthwiseFloats = 48 * 1024 / 4;  // shared memory for a block's filters

}  // namespace

// Threads of a block: `lanes` filters by kThreads / lanes groups of pixels.
template <typename T>
__global__ void __launch_bounds__(kThreads) conv2d_grouped(const __grid_constant__ ConvProblem problem, int lanes) {
  const ConvShape& shape = problem.shape;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes, lane_row = thread / lanes, rows = kThreads / lanes;
  const int64_t k = static_cast<int64_t>(blockIdx.y) * lanes + lane;
  if (lane_row >= rows || k >= static_cast<int64_t>(shape.filters) * problem.groups) return;
  const int64_t group = k / shape.filters;
  const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * rows + lane_row) * kPixels;
  const T* input = static_cast<const T*>(problem.input) + group * shape.channels;
  const T* weight = static_cast<const T*>(problem.weight) + k * problem.weight_row_stride;

  PixelOrigin origin[kPixels];
  float acc[kPixels] = {};
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const int64_t row = first_row + i;
    origin[i] = pixel_origin(shape, row < shape.rows ? static_cast<int32_t>(row) : shape.rows);
  }
  for (int column = 0; column < shape.reduction; ++column) {
    const FilterTap tap = filter_tap(shape, column);
    const float w = to_float(weight[column]);
    const int64_t channel = group * shape.channels + tap.channel;
    const float scale = problem.input_scale != nullptr ? __ldg(problem.input_scale + channel) : 1.0f;
    const float shift = problem.input_shift != nullptr ? __ldg(problem.input_shift + channel) : 0.0f;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      if (!inside_image(shape, origin[i], tap)) continue;
      const float x = to_float(input[origin[i].offset + tap.offset]) * scale + shift;
      acc[i] += (problem.input_relu ? relu(x) : x) * w;
    }
  }
  const float scale = problem.scale != nullptr ? __ldg(problem.scale + k) : 1.0f;
  const float bias = problem.bias != nullptr ? __ldg(problem.bias + k) : 0.0f;
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const int64_t row = first_row + i;
    if (row >= shape.rows) continue;
    float y = acc[i] * scale + bias;
    if (problem.residual != nullptr) {
      y += to_float(static_cast<const T*>(problem.residual)[row * problem.residual_stride + k]);
    }
    static_cast<T*>(problem.out)[row * problem.out_stride + k] = from_float<T>(problem.relu ? relu(y) : y);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) conv2d_depthwise(const __grid_constant__ ConvProblem problem, int lanes) {
  constexpr int kWidth = kVector<T>;
  const ConvShape& shape = problem.shape;
  const int taps = shape.reduction;  // R * S: one channel per group
  const int channels = problem.groups;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes, lane_row = thread / lanes, rows = kThreads / lanes;
  const int block_channels = lanes * kWidth;
  const int block_first = static_cast<int>(blockIdx.y) * block_channels;

  float* filters = reinterpret_cast<float*>(dynamic_shared());  // [tap][block_channels]
  for (int i = thread; i < taps * block_channels; i += kThreads) {
    const int c = i / taps, tap = i - c * taps;
    filters[tap * block_channels + c] =
        block_first + c < channels
            ? to_float(static_cast<const T*>(problem.weight)[(block_first + c) * problem.weight_row_stride + tap])
            : 0.0f;
  }
  __syncthreads();

  const int c = block_first + lane * kWidth;  // channels are a multiple of kWidth
  if (lane_row >= rows || c >= channels) return;
  const T* input = static_cast<const T*>(problem.input) + c;
  float scale[kWidth], bias[kWidth];
  load_coefficients<kWidth>(scale, problem.scale, c, channels, 1.0f);
  load_coefficients<kWidth>(bias, problem.bias, c, channels, 0.0f);
  const bool prologue = problem.input_scale != nullptr || problem.input_shift != nullptr || problem.input_relu;
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * rows;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * rows + lane_row; row < shape.rows; row += row_step) {
    const PixelOrigin origin = pixel_origin(shape, static_cast<int32_t>(row));
    float acc[kWidth] = {};
#pragma unroll 3
    for (int t = 0; t < taps; ++t) {
      const FilterTap tap = filter_tap(shape, t);
      if (!inside_image(shape, origin, tap)) continue;
      float x[kWidth];
      load<kWidth>(x, input + origin.offset + tap.offset);
      const float* w = filters + t * block_channels + lane * kWidth;
      if (prologue) {
        float a[kWidth], b[kWidth];
        load_coefficients<kWidth>(a, problem.input_scale, c, channels, 1.0f);
        load_coefficients<kWidth>(b, problem.input_shift, c, channels, 0.0f);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          x[i] = x[i] * a[i] + b[i];
          x[i] = problem.input_relu ? relu(x[i]) : x[i];
        }
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) acc[i] += x[i] * w[i];
    }
    float y[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) y[i] = acc[i] * scale[i] + bias[i];
    if (problem.residual != nullptr) {
      float r[kWidth];
      load<kWidth>(r, static_cast<const T*>(problem.residual) + row * problem.residual_stride + c);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) y[i] += r[i];
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) y[i] = problem.relu ? relu(y[i]) : y[i];
    store<kWidth>(static_cast<T*>(problem.out) + row * problem.out_stride + c, y);
  }
}

template <typename T>
void launch_conv2d_grouped(const ConvProblem& problem, const LaunchTarget& target) {
  const int64_t filters = static_cast<int64_t>(problem.shape.filters) * problem.groups;
  const int lanes = static_cast<int>(filters < kThreads ? filters : kThreads);
  const int rows = kThreads / lanes * kPixels;
  const dim3 grid(static_cast<unsigned>(ceil_divide(problem.shape.rows, rows)),
                  static_cast<unsigned>(ceil_divide(filters, lanes)));
  launch<conv2d_grouped<T>>("conv2d grouped", target.device, grid, kThreads, 0, target.stream, problem, lanes);
}

// Chunks of channels per block, as far as their filters fit in shared memory; 0 when not even one does.
template <typename T>
static int depthwise_lanes(const ConvProblem& problem) {
  const int64_t fit = kDepthwiseFloats / (static_cast<int64_t>(problem.shape.reduction) * kVector<T>);
  const int64_t chunks = problem.groups / kVector<T>;
  const int64_t lanes = chunks < 32 ? chunks : 32;
  return static_cast<int>(lanes < fit ? lanes : fit);
}

template <typename T>
bool depthwise_fits(const ConvProblem& problem) {
  return problem.groups % kVector<T> == 0 && depthwise_lanes<T>(problem) > 0;
}

template <typename T>
void launch_conv2d_depthwise(const ConvProblem& problem, const LaunchTarget& target) {
  const int lanes = depthwise_lanes<T>(problem);
  const int64_t block_channels = static_cast<int64_t>(lanes) * kVector<T>;
  const int64_t rows = kThreads / lanes;
  const int64_t columns = ceil_divide(problem.groups, block_channels);
  // Enough blocks to fill the device several times over; each then amortises its filters over many pixels.
  const int64_t wanted = ceil_divide(int64_t{16} * device_facts(target.device).multiprocessors, columns);
  const int64_t available = ceil_divide(problem.shape.rows, rows);
  const dim3 grid(static_cast<unsigned>(available < wanted ? available : wanted), static_cast<unsigned>(columns));
  const size_t shared_bytes = static_cast<size_t>(problem.shape.reduction) * block_channels * sizeof(float);
  launch<conv2d_depthwise<T>>("conv2d depthwise", target.device, grid, kThreads, shared_bytes, target.stream, problem,
                              lanes);
}

#define FASTCNN_INSTANTIATE(T)                                                     \
  template void launch_conv2d_grouped<T>(const ConvProblem&, const LaunchTarget&); \
  template bool depthwise_fits<T>(const ConvProblem&);                             \
  template void launch_conv2d_depthwise<T>(const ConvProblem&, const LaunchTarget&)
FASTCNN_INSTANTIATE(float);
FASTCNN_INSTANTIATE(__nv_bfloat16);
FASTCNN_INSTANTIATE(__half);
#undef FASTCNN_INSTANTIATE

}  // namespace fastcnn::cuda
