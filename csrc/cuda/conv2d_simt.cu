// Convolution in exact fp32 on CUDA cores: implicit matrix product, tiled in registers. For users who asked for no
// TF32.
//
//   out[m, k] = act(sum_j A[m, j] * B[k, j] * scale[k] + bias[k] + residual[m, k]),  m, j as in device/conv_index.h
//
// Work: one block of 128 threads per 128 rows of m by 64 filters and group; a thread computes 8x8 outputs, as four 4x4
//   squares 64 rows and 32 columns apart, so that a warp's 16-byte reads of shared memory do not collide.
// Shared memory: two tiles of 16 values of j, j-major ("transposed"), filled through registers one tile ahead; behind
//   them, for long reductions, each thread's sums of the runs of 512 values of j that are done. One chain of additions
//   through thousands of products would err more than cuBLAS, which splits long sums.
// Registers: 64 accumulators, 16 operands, 24 values in flight.
// Floor: 2*N*P*Q*K*R*S*C/g operations at 128 FMA per clock and multiprocessor; the ratio of FMA to loads from shared
//   memory (64 to 4) keeps the FMA pipes, not shared memory, the limit.
#include "conv2d_problem.h"
#include "device/conv_index.h"
#include "device/numeric.cuh"
#include "device/ptx.cuh"
#include "host.h"

namespace fastcnn::cuda {
namespace {

constexpr int kRows = 128, kColumns = 64, kDepth = 16, kThreads = 128;
constexpr int kPitchA = kRows + 4, kPitchB = kColumns + 4;  // keeps 16-byte alignment, staggers the banks
constexpr int kStageFloats = kDepth * (kPitchA + kPitchB);
constexpr int kRun = 32;  // tiles that are summed in the accumulators
constexpr int kSumFloats = kRows * kColumns;
constexpr int kRowStep = kThreads / 4;  // a thread loads 4 values of j for every 32nd row
constexpr int kPassesA = kRows / kRowStep, kPassesB = kColumns / kRowStep;

struct Fetch {
  float a[kPassesA][4];
  float b[kPassesB][4];
};

__device__ __forceinline__ float prologue(const ConvProblem& problem, float x, float scale, float shift) {
  x = x * scale + shift;
  return problem.input_relu ? relu(x) : x;
}

}  // namespace

template <bool kVectors>
__global__ void __launch_bounds__(kThreads) conv2d_simt(const __grid_constant__ ConvProblem problem) {
  const ConvShape& shape = problem.shape;
  int32_t column_tile;
  const int32_t row_tile = problem.by_column_tiles.divide(static_cast<int32_t>(blockIdx.x), column_tile);
  const int first_row = row_tile * kRows, first_column = column_tile * kColumns;
  const int group = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const int load_row = thread / 4, load_k = thread % 4 * 4;
  const float* input = static_cast<const float*>(problem.input) + static_cast<int64_t>(group) * shape.channels;
  const float* filter =
      static_cast<const float*>(problem.weight) +
      (static_cast<int64_t>(group) * shape.filters + first_column + load_row) * problem.weight_row_stride;
  const int filters_left = shape.filters - first_column - load_row;
  const int64_t first_channel = static_cast<int64_t>(group) * shape.channels;

  PixelOrigin origin[kPassesA];
#pragma unroll
  for (int pass = 0; pass < kPassesA; ++pass)
    origin[pass] = pixel_origin(shape, first_row + load_row + pass * kRowStep);

  // Four values of j for each row; the prologue is applied at once, as there is nothing to round.
  auto fetch = [&](int tile, Fetch& f) {
    const int k = tile * kDepth + load_k;
    if constexpr (kVectors) {
      const FilterTap tap = filter_tap(shape, k);
      const bool real_k = k < shape.reduction;
      float scale[4], shift[4];
      const int64_t end = real_k ? first_channel + shape.channels : 0;
      load_coefficients<4>(scale, problem.input_scale, first_channel + tap.channel, end, 1.0f);
      load_coefficients<4>(shift, problem.input_shift, first_channel + tap.channel, end, 0.0f);
#pragma unroll
      for (int pass = 0; pass < kPassesA; ++pass) {
        const bool real = inside_image(shape, origin[pass], tap);
        float x[4] = {};
        if (real) load<4>(x, input + origin[pass].offset + tap.offset);
#pragma unroll
        for (int i = 0; i < 4; ++i) f.a[pass][i] = real ? prologue(problem, x[i], scale[i], shift[i]) : 0.0f;
      }
#pragma unroll
      for (int pass = 0; pass < kPassesB; ++pass) {
        float x[4] = {};
        if (real_k && pass * kRowStep < filters_left) {
          load<4>(x, filter + pass * kRowStep * problem.weight_row_stride + k);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) f.b[pass][i] = x[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const FilterTap tap = filter_tap(shape, k + i);
        const bool real_k = k + i < shape.reduction;
        const int64_t channel = first_channel + tap.channel;
        const float scale = real_k && problem.input_scale != nullptr ? __ldg(problem.input_scale + channel) : 1.0f;
        const float shift = real_k && problem.input_shift != nullptr ? __ldg(problem.input_shift + channel) : 0.0f;
#pragma unroll
        for (int pass = 0; pass < kPassesA; ++pass) {
          f.a[pass][i] = 0.0f;
          if (inside_image(shape, origin[pass], tap)) {
            f.a[pass][i] = prologue(problem, input[origin[pass].offset + tap.offset], scale, shift);
          }
        }
#pragma unroll
        for (int pass = 0; pass < kPassesB; ++pass) {
          f.b[pass][i] = 0.0f;
          if (real_k && pass * kRowStep < filters_left) {
            f.b[pass][i] = filter[pass * kRowStep * problem.weight_row_stride + k + i];
          }
        }
      }
    }
  };

  float* shared = reinterpret_cast<float*>(dynamic_shared());
  auto put = [&](int stage, const Fetch& f) {
    float* a = shared + stage * kStageFloats;
    float* b = a + kDepth * kPitchA;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int pass = 0; pass < kPassesA; ++pass) a[(load_k + i) * kPitchA + load_row + pass * kRowStep] = f.a[pass][i];
#pragma unroll
      for (int pass = 0; pass < kPassesB; ++pass) b[(load_k + i) * kPitchB + load_row + pass * kRowStep] = f.b[pass][i];
    }
  };

  const int row = thread / 8 * 4, column = thread % 8 * 4;  // of the first 4x4 square
  float acc[8][8] = {};
  const int tiles = (shape.reduction + kDepth - 1) / kDepth;
  Fetch fetched;
  for (int t = -1; t < tiles; ++t) {
    const bool more = t + 1 < tiles;
    if (more) fetch(t + 1, fetched);
    if (t >= 0) {
      const float* a = shared + t % 2 * kStageFloats;
      const float* b = a + kDepth * kPitchA;
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        alignas(16) float x[8], y[8];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<float4*>(&x[4 * half]) =
              *reinterpret_cast<const float4*>(a + k * kPitchA + row + half * (kRows / 2));
          *reinterpret_cast<float4*>(&y[4 * half]) =
              *reinterpret_cast<const float4*>(b + k * kPitchB + column + half * (kColumns / 2));
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) acc[i][j] += x[i] * y[j];
        }
      }
    }
    if (more) put((t + 1) % 2, fetched);
    __syncthreads();
    if (tiles > kRun && t >= 0 && ((t + 1) % kRun == 0 || !more)) {
      float* sums = shared + 2 * kStageFloats + thread;  // a thread's own, read and written by no other
#pragma unroll
      for (int e = 0; e < 64; ++e) {
        float& value = acc[e / 8][e % 8];
        if (t >= kRun) value += sums[e * kThreads];
        if (more) {
          sums[e * kThreads] = value;
          value = 0.0f;
        }
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = first_column + column + half * (kColumns / 2);
    if (first >= shape.filters) continue;
    const int64_t channel = static_cast<int64_t>(group) * shape.filters + first;
    const int64_t end = static_cast<int64_t>(group + 1) * shape.filters;
    float scale[4], bias[4];
    load_coefficients<4>(scale, problem.scale, channel, end, 1.0f);
    load_coefficients<4>(bias, problem.bias, channel, end, 0.0f);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int m = first_row + row + i % 4 + i / 4 * (kRows / 2);
      if (m >= shape.rows) continue;
      float* out = static_cast<float*>(problem.out) + static_cast<int64_t>(m) * problem.out_stride + channel;
      const float* residual = problem.residual == nullptr
                                  ? nullptr
                                  : static_cast<const float*>(problem.residual) +
                                        static_cast<int64_t>(m) * problem.residual_stride + channel;
      const bool whole = problem.vector_output && first + 4 <= shape.filters;
      float y[4], r[4] = {};
      if (residual != nullptr && whole) load<4>(r, residual);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (residual != nullptr && !whole && first + j < shape.filters) r[j] = residual[j];
        y[j] = acc[i][4 * half + j] * scale[j] + bias[j] + r[j];
        y[j] = problem.relu ? relu(y[j]) : y[j];
      }
      if (whole) {
        store<4>(out, y);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (first + j < shape.filters) out[j] = y[j];
        }
      }
    }
  }
}

void launch_conv2d_simt(const ConvProblem& unready, LoadPath path, const LaunchTarget& target) {
  ConvProblem problem = unready;
  const int64_t column_tiles = ceil_divide(problem.shape.filters, kColumns);
  const int64_t row_tiles = ceil_divide(problem.shape.rows, kRows);
  problem.by_column_tiles = FastDivisor(column_tiles);
  const dim3 grid(static_cast<unsigned>(column_tiles * row_tiles), static_cast<unsigned>(problem.groups));
  const bool runs = problem.shape.reduction > kRun * kDepth;
  const size_t bytes = (2 * kStageFloats + (runs ? kSumFloats : 0)) * sizeof(float);
  if (path == LoadPath::staged_elements) {
    launch<conv2d_simt<false>>("conv2d simt elements", target.device, grid, kThreads, bytes, target.stream, problem);
  } else {
    launch<conv2d_simt<true>>("conv2d simt", target.device, grid, kThreads, bytes, target.stream, problem);
  }
}

}  // namespace fastcnn::cuda
