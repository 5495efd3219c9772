// channel_affine and residual_add: y = act((x - centre) * scale + shift + residual), one pass over memory.
//
// Layout: (pixels, C) with a pixel stride each. A thread keeps one chunk of channels (16 bytes where everything is
//   aligned, one element otherwise) and walks down the pixels, so that the vectors are loaded once into registers
//   and no index is divided. Neighbouring threads hold neighbouring chunks, then neighbouring pixels.
// In flight: a tile of neighbouring pixels, four a thread, all loaded before the first is converted: 48 KiB (96 with a
//   residual) on a multiprocessor, where 3 TB/s need 16 to 24. out may alias input or residual element by element.
// Floor: bytes of x, residual and y once through DRAM.
#include "device/numeric.cuh"
#include "device/ptx.cuh"
#include "host.h"
#include "kernels.h"

namespace fastcnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

struct ElementwiseProblem {
  const void* input;
  const void* residual;  // may be null
  void* out;
  int64_t input_stride, residual_stride, out_stride;
  int64_t pixels, channels;
  const float* scale;   // may be null: constant_scale
  const float* shift;   // may be null: 0
  const float* centre;  // may be null: 0
  float constant_scale;
  bool relu;
};

}  // namespace

// A block is `lanes` chunks by kThreads / lanes pixels.
template <typename T, int kWidth, bool kResidual>
__global__ void __launch_bounds__(kThreads, 3)
    elementwise(const __grid_constant__ ElementwiseProblem problem, int lanes) {
  let_next_kernel_begin();
  wait_for_earlier_kernels();
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes, lane_row = thread / lanes, rows = kThreads / lanes;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * kWidth;
  if (lane_row >= rows || c >= problem.channels) return;

  float scale[kWidth], shift[kWidth], centre[kWidth];
  load_coefficients<kWidth>(scale, problem.scale, c, problem.channels, problem.constant_scale);
  load_coefficients<kWidth>(shift, problem.shift, c, problem.channels, 0.0f);
  load_coefficients<kWidth>(centre, problem.centre, c, problem.channels, 0.0f);
  const T* input = static_cast<const T*>(problem.input) + c;
  const T* residual = static_cast<const T*>(problem.residual) + (kResidual ? c : 0);
  T* out = static_cast<T*>(problem.out) + c;

  const int64_t tile = static_cast<int64_t>(rows) * kUnroll, step = tile * gridDim.x;
  for (int64_t first = tile * blockIdx.x + lane_row; first < problem.pixels; first += step) {
    Raw<kWidth, T> x[kUnroll] = {}, r[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t pixel = first + u * rows;
      if (pixel < problem.pixels) x[u] = load_raw<kWidth>(input + pixel * problem.input_stride);
    }
#pragma unroll
    for (int u = 0; kResidual && u < kUnroll; ++u) {
      const int64_t pixel = first + u * rows;
      if (pixel < problem.pixels) r[u] = load_raw<kWidth>(residual + pixel * problem.residual_stride);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t pixel = first + u * rows;
      if (pixel >= problem.pixels) continue;
      float y[kWidth], added[kWidth];
      convert(y, x[u]);
      convert(added, r[u]);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        y[i] = (y[i] - centre[i]) * scale[i] + shift[i];
        if (kResidual) y[i] += added[i];
        y[i] = problem.relu ? relu(y[i]) : y[i];
      }
      store<kWidth>(out + pixel * problem.out_stride, y);
    }
  }
}

namespace {

template <typename T, int kWidth>
void launch_elementwise(const char* name, const ElementwiseProblem& problem, int device, void* stream) {
  const int64_t chunks = ceil_divide(problem.channels, kWidth);
  const int lanes = static_cast<int>(chunks < kThreads ? chunks : kThreads);
  const int64_t columns = ceil_divide(chunks, lanes);
  const int64_t available = ceil_divide(problem.pixels, int64_t{kThreads / lanes} * kUnroll);
  const int64_t wanted = ceil_divide(int64_t{16} * device_facts(device).multiprocessors, columns);
  const dim3 grid(static_cast<unsigned>(available < wanted ? available : wanted), static_cast<unsigned>(columns));
  if (problem.residual != nullptr) {
    launch_early<elementwise<T, kWidth, true>>(name, device, grid, kThreads, 0, stream, problem, lanes);
  } else {
    launch_early<elementwise<T, kWidth, false>>(name, device, grid, kThreads, 0, stream, problem, lanes);
  }
}

void run(const char* name, const TensorView& out, const TensorView& input, const TensorView& residual,
         const float* scale, const float* shift, const float* centre, float constant_scale, Activation activation,
         int device, void* stream) {
  const DeviceGuard guard(device);
  const ElementwiseProblem problem = {input.data,
                                      residual.data,
                                      out.data,
                                      input.pixel_stride,
                                      residual.pixel_stride,
                                      out.pixel_stride,
                                      input.pixels(),
                                      input.c,
                                      scale,
                                      shift,
                                      centre,
                                      constant_scale,
                                      activation == Activation::relu};
  const bool vectors = aligned_16(input) && aligned_16(out) && (!residual || aligned_16(residual)) &&
                       input.c * size_in_bytes(input.dtype) % 16 == 0;
  switch (input.dtype) {
    case DType::f32:
      return vectors ? launch_elementwise<float, 4>(name, problem, device, stream)
                     : launch_elementwise<float, 1>(name, problem, device, stream);
    case DType::bf16:
      return vectors ? launch_elementwise<__nv_bfloat16, 8>(name, problem, device, stream)
                     : launch_elementwise<__nv_bfloat16, 1>(name, problem, device, stream);
    case DType::f16:
      return vectors ? launch_elementwise<__half, 8>(name, problem, device, stream)
                     : launch_elementwise<__half, 1>(name, problem, device, stream);
  }
}

}  // namespace

void channel_affine(const TensorView& out, const TensorView& input, const float* scale, const float* shift,
                    const float* centre, const TensorView& residual, Activation activation, int device, void* stream) {
  run("channel_affine", out, input, residual, scale, shift, centre, 1.0f, activation, device, stream);
}

void residual_add(const TensorView& out, const TensorView& input, const TensorView& residual, float scale,
                  Activation activation, int device, void* stream) {
  run("residual_add", out, input, residual, nullptr, nullptr, nullptr, scale, activation, device, stream);
}

}  // namespace fastcnn::cuda
