// Pooling: out[n, p, q, c] = max or mean of input[n, h, w, c] over the window of (p, q).
//
// Layout: NHWC with a pixel stride each. A thread keeps one chunk of channels (16 bytes where aligned, else one
// element)
//   and computes output pixels one after another; neighbouring threads hold neighbouring chunks, so every read is a
//   whole line, and the overlap of windows is reread from L1 and L2.
// Mean over the whole image (adaptive pooling to 1x1) would leave most of the device idle with a thread per output: a
//   block per image and strip of chunks splits the pixels over its rows and adds the rows up in shared memory, in a
//   fixed order.
// NaN: the maximum of a window with a NaN is NaN, as in PyTorch.
// Floor: input and output once through DRAM.
#include <algorithm>

#include "device/fast_divide.h"
#include "device/numeric.cuh"
#include "device/pool_index.h"
#include "device/ptx.cuh"
#include "host.h"
#include "kernels.h"

namespace fastcnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPixelLimit = int64_t{1} << 30;

struct PoolProblem {
  const void* input;
  void* out;
  int64_t input_stride, out_stride;
  int32_t pixels;  // of the output, in this launch
  int64_t channels;
  PoolAxis vertical, horizontal;
  FastDivisor by_image, by_row;
  bool count_include_pad;
  float divisor;  // 0: the window's size
};

// A thread's chunk of channels, and its place among the `rows` of threads that have the same: `lanes` chunks side by
// side.
struct ThreadChunk {
  int row, rows;
  int64_t channel;
  __device__ __forceinline__ ThreadChunk(int lanes, int width) {
    const int thread = static_cast<int>(threadIdx.x);
    row = thread / lanes;
    rows = kThreads / lanes;
    channel = (static_cast<int64_t>(blockIdx.y) * lanes + thread % lanes) * width;
  }
};

struct Maximum {
  static constexpr bool kMean = false;
  static __device__ __forceinline__ float start() { return -INFINITY; }
  static __device__ __forceinline__ float add(float a, float x) { return x > a || x != x ? x : a; }
};

struct Mean {
  static constexpr bool kMean = true;
  static __device__ __forceinline__ float start() { return 0.0f; }
  static __device__ __forceinline__ float add(float a, float x) { return a + x; }
};

// What a mean's sum is multiplied by; 0 for a window that holds no real pixel.
__device__ __forceinline__ float mean_factor(const PoolProblem& problem, const PoolWindow& v, const PoolWindow& h) {
  if (v.end <= v.begin || h.end <= h.begin) return 0.0f;
  const float counted = problem.count_include_pad
                            ? static_cast<float>(v.padded) * static_cast<float>(h.padded)
                            : static_cast<float>(v.end - v.begin) * static_cast<float>(h.end - h.begin);
  return reciprocal(problem.divisor != 0.0f ? problem.divisor : counted);
}

// The position itself, or the next one in the image.
__device__ __forceinline__ int32_t inside(int32_t position, int32_t size) {
  return position < 0 ? 0 : smaller(position, size - 1);
}

}  // namespace

template <typename T, int kWidth, typename Reduction>
__global__ void __launch_bounds__(kThreads, 4) pool2d(const __grid_constant__ PoolProblem problem, int lanes) {
  let_next_kernel_begin();
  wait_for_earlier_kernels();
  const ThreadChunk chunk(lanes, kWidth);
  if (chunk.row >= chunk.rows || chunk.channel >= problem.channels) return;
  const T* input = static_cast<const T*>(problem.input) + chunk.channel;
  T* out = static_cast<T*>(problem.out) + chunk.channel;
  const int64_t step = static_cast<int64_t>(gridDim.x) * chunk.rows;
  for (int64_t pixel = static_cast<int64_t>(blockIdx.x) * chunk.rows + chunk.row; pixel < problem.pixels;
       pixel += step) {
    int32_t in_image, q;
    const int32_t n = problem.by_image.divide(static_cast<int32_t>(pixel), in_image);
    const int32_t p = problem.by_row.divide(in_image, q);
    const PoolWindow v = pool_window(problem.vertical, p), h = pool_window(problem.horizontal, q);
    float y[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) y[i] = Reduction::start();
    for (int32_t row = v.begin; row < v.end; row += problem.vertical.dilation) {
      const int64_t line = (static_cast<int64_t>(n) * problem.vertical.size + row) * problem.horizontal.size;
      const T* at = input + (line + h.begin) * problem.input_stride;
      const int64_t stride = problem.horizontal.dilation * problem.input_stride;
#pragma unroll 3
      for (int32_t column = h.begin; column < h.end; column += problem.horizontal.dilation, at += stride) {
        float x[kWidth];
        load<kWidth>(x, at);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) y[i] = Reduction::add(y[i], x[i]);
      }
    }
    if constexpr (Reduction::kMean) {
      const float factor = mean_factor(problem, v, h);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) y[i] *= factor;
    }
    store<kWidth>(out + pixel * problem.out_stride, y);
  }
}

// The same for windows of kSize x kSize without dilation, whose loads are all in flight together. What lies outside of
// the image is read from its edge: a maximum does not mind, a mean leaves it out.
template <typename T, int kWidth, typename Reduction, int kSize>
__global__ void __launch_bounds__(kThreads, 4) pool2d_small(const __grid_constant__ PoolProblem problem, int lanes) {
  let_next_kernel_begin();
  wait_for_earlier_kernels();
  const ThreadChunk chunk(lanes, kWidth);
  if (chunk.row >= chunk.rows || chunk.channel >= problem.channels) return;
  const T* input = static_cast<const T*>(problem.input) + chunk.channel;
  T* out = static_cast<T*>(problem.out) + chunk.channel;
  const PoolAxis &vertical = problem.vertical, &horizontal = problem.horizontal;
  const int64_t step = static_cast<int64_t>(gridDim.x) * chunk.rows;
  for (int64_t pixel = static_cast<int64_t>(blockIdx.x) * chunk.rows + chunk.row; pixel < problem.pixels;
       pixel += step) {
    int32_t in_image, q;
    const int32_t n = problem.by_image.divide(static_cast<int32_t>(pixel), in_image);
    const int32_t p = problem.by_row.divide(in_image, q);
    const int32_t top = p * vertical.stride - vertical.pad_start, left = q * horizontal.stride - horizontal.pad_start;
    const int64_t first_line = static_cast<int64_t>(n) * vertical.size;
    Raw<kWidth, T> x[kSize][kSize];
#pragma unroll
    for (int r = 0; r < kSize; ++r) {
      const int64_t line = (first_line + inside(top + r, vertical.size)) * horizontal.size;
#pragma unroll
      for (int s = 0; s < kSize; ++s) {
        x[r][s] = load_raw_cached<kWidth>(input + (line + inside(left + s, horizontal.size)) * problem.input_stride);
      }
    }
    float y[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) y[i] = Reduction::start();
#pragma unroll
    for (int r = 0; r < kSize; ++r) {
#pragma unroll
      for (int s = 0; s < kSize; ++s) {
        const bool real = inside(top + r, vertical.size) == top + r && inside(left + s, horizontal.size) == left + s;
        if (Reduction::kMean && !real) continue;
        float values[kWidth];
        convert(values, x[r][s]);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) y[i] = Reduction::add(y[i], values[i]);
      }
    }
    if constexpr (Reduction::kMean) {
      const float factor = mean_factor(problem, pool_window(vertical, p), pool_window(horizontal, q));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) y[i] *= factor;
    }
    store<kWidth>(out + pixel * problem.out_stride, y);
  }
}

// One block per image (blockIdx.x) and strip of `lanes` chunks (blockIdx.y).
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 4) global_mean(const __grid_constant__ PoolProblem problem, int lanes) {
  let_next_kernel_begin();
  wait_for_earlier_kernels();
  const ThreadChunk chunk(lanes, kWidth);
  const int thread = static_cast<int>(threadIdx.x), lane_row = chunk.row, rows = chunk.rows;
  const int64_t c = chunk.channel;
  const bool active = lane_row < rows && c < problem.channels;
  const int64_t image = static_cast<int64_t>(problem.vertical.size) * problem.horizontal.size;
  float sum[kWidth] = {};
  if (active) {
    constexpr int kBatch = 8;  // loads in flight
    const T* at =
        static_cast<const T*>(problem.input) + c + static_cast<int64_t>(blockIdx.x) * image * problem.input_stride;
    for (int64_t first = lane_row; first < image; first += kBatch * rows) {
      Raw<kWidth, T> raw[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int64_t pixel = first + u * rows;
        raw[u] = load_raw_cached<kWidth>(at + (pixel < image ? pixel : image - 1) * problem.input_stride);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        float x[kWidth];
        convert(x, raw[u]);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum[i] += first + u * rows < image ? x[i] : 0.0f;
      }
    }
  }
  float* partial = reinterpret_cast<float*>(dynamic_shared());  // [kWidth][row][lane]
#pragma unroll
  for (int i = 0; i < kWidth; ++i) partial[i * kThreads + thread] = sum[i];
  __syncthreads();
  if (!active || lane_row != 0) return;
  for (int row = 1; row < rows; ++row) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] += partial[i * kThreads + row * lanes + thread];
  }
  const float factor = reciprocal(static_cast<float>(image));
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] *= factor;
  store<kWidth>(static_cast<T*>(problem.out) + static_cast<int64_t>(blockIdx.x) * problem.out_stride + c, sum);
}

namespace {

enum class Kind { maximum, mean, global };

template <typename T, int kWidth, typename Reduction>
void launch_windows(const char* name, int device, dim3 grid, void* stream, const PoolProblem& problem, int lanes) {
  const PoolAxis &v = problem.vertical, &h = problem.horizontal;
  const bool plain = !v.adaptive && v.kernel == h.kernel && v.dilation == 1 && h.dilation == 1;
  if (plain && v.kernel == 3) {
    launch_early<pool2d_small<T, kWidth, Reduction, 3>>(name, device, grid, kThreads, 0, stream, problem, lanes);
  } else if (plain && v.kernel == 2) {
    launch_early<pool2d_small<T, kWidth, Reduction, 2>>(name, device, grid, kThreads, 0, stream, problem, lanes);
  } else {
    launch_early<pool2d<T, kWidth, Reduction>>(name, device, grid, kThreads, 0, stream, problem, lanes);
  }
}

template <typename T, int kWidth>
void launch_pool(Kind kind, const char* name, const PoolProblem& problem, int64_t images, int device, void* stream) {
  const int64_t chunks = problem.channels / kWidth;
  if (kind == Kind::global) {
    const int lanes = static_cast<int>(std::min<int64_t>(chunks, 32));
    const dim3 grid(static_cast<unsigned>(images), static_cast<unsigned>(ceil_divide(chunks, lanes)));
    launch_early<global_mean<T, kWidth>>(name, device, grid, kThreads, kThreads * kWidth * sizeof(float), stream,
                                         problem, lanes);
    return;
  }
  const int lanes = static_cast<int>(std::min<int64_t>(chunks, kThreads));
  const int64_t columns = ceil_divide(chunks, lanes);
  const int64_t wanted = ceil_divide(int64_t{32} * device_facts(device).multiprocessors, columns);
  const int64_t available = ceil_divide(problem.pixels, kThreads / lanes);
  const dim3 grid(static_cast<unsigned>(std::min(available, wanted)), static_cast<unsigned>(columns));
  if (kind == Kind::maximum) {
    launch_windows<T, kWidth, Maximum>(name, device, grid, stream, problem, lanes);
  } else {
    launch_windows<T, kWidth, Mean>(name, device, grid, stream, problem, lanes);
  }
}

PoolAxis make_axis(int64_t size, int64_t outputs, int64_t kernel, int64_t stride, int64_t pad_start, int64_t pad_end,
                   int64_t dilation) {
  PoolAxis axis;
  axis.size = static_cast<int32_t>(size);
  axis.outputs = static_cast<int32_t>(outputs);
  axis.kernel = static_cast<int32_t>(kernel);
  axis.stride = static_cast<int32_t>(stride);
  axis.pad_start = static_cast<int32_t>(pad_start);
  axis.pad_end = static_cast<int32_t>(pad_end);
  axis.dilation = static_cast<int32_t>(dilation);
  return axis;
}

void run(Kind kind, const char* name, const TensorView& out, const TensorView& input, PoolProblem problem, int device,
         void* stream) {
  for (const int64_t extent : {input.h, input.w, out.h * problem.vertical.stride, out.w * problem.horizontal.stride,
                               int64_t{problem.vertical.kernel} * problem.vertical.dilation,
                               int64_t{problem.horizontal.kernel} * problem.horizontal.dilation, out.h * out.w}) {
    if (extent >= kPixelLimit) {
      throw std::invalid_argument(std::string("fastcnn CUDA ") + name + ": image or window is 2^30 or larger");
    }
  }
  const DeviceGuard guard(device);
  const int64_t size = size_in_bytes(input.dtype);
  const bool vectors = aligned_16(input) && aligned_16(out) && input.c * size % 16 == 0;
  problem.input_stride = input.pixel_stride;
  problem.out_stride = out.pixel_stride;
  problem.channels = input.c;
  problem.by_image = FastDivisor(out.h * out.w);
  problem.by_row = FastDivisor(out.w);
  const int64_t images = std::min(input.n, (kPixelLimit - 1) / (out.h * out.w));
  for (int64_t first = 0; first < input.n; first += images) {
    const int64_t count = std::min(images, input.n - first);
    problem.input = static_cast<char*>(input.data) + first * input.h * input.w * input.pixel_stride * size;
    problem.out = static_cast<char*>(out.data) + first * out.h * out.w * out.pixel_stride * size;
    problem.pixels = static_cast<int32_t>(count * out.h * out.w);
    switch (input.dtype) {
      case DType::f32:
        vectors ? launch_pool<float, 4>(kind, name, problem, count, device, stream)
                : launch_pool<float, 1>(kind, name, problem, count, device, stream);
        break;
      case DType::bf16:
        vectors ? launch_pool<__nv_bfloat16, 8>(kind, name, problem, count, device, stream)
                : launch_pool<__nv_bfloat16, 1>(kind, name, problem, count, device, stream);
        break;
      case DType::f16:
        vectors ? launch_pool<__half, 8>(kind, name, problem, count, device, stream)
                : launch_pool<__half, 1>(kind, name, problem, count, device, stream);
        break;
    }
  }
}

}  // namespace

void max_pool2d(const TensorView& out, const TensorView& input, const Pool2dGeometry& geometry, int device,
                void* stream) {
  PoolProblem problem = {};
  problem.vertical =
      make_axis(input.h, out.h, geometry.kernel_h, geometry.stride_h, geometry.pad_top, 0, geometry.dilation_h);
  problem.horizontal =
      make_axis(input.w, out.w, geometry.kernel_w, geometry.stride_w, geometry.pad_left, 0, geometry.dilation_w);
  run(Kind::maximum, "max_pool2d", out, input, problem, device, stream);
}

void avg_pool2d(const TensorView& out, const TensorView& input, const Pool2dGeometry& geometry, int64_t pad_bottom,
                int64_t pad_right, bool count_include_pad, int64_t divisor, int device, void* stream) {
  PoolProblem problem = {};
  problem.vertical = make_axis(input.h, out.h, geometry.kernel_h, geometry.stride_h, geometry.pad_top, pad_bottom, 1);
  problem.horizontal = make_axis(input.w, out.w, geometry.kernel_w, geometry.stride_w, geometry.pad_left, pad_right, 1);
  problem.count_include_pad = count_include_pad;
  problem.divisor = static_cast<float>(divisor);
  run(Kind::mean, "avg_pool2d", out, input, problem, device, stream);
}

void adaptive_avg_pool2d(const TensorView& out, const TensorView& input, int device, void* stream) {
  PoolProblem problem = {};
  problem.vertical = make_axis(input.h, out.h, 1, 1, 0, 0, 1);
  problem.horizontal = make_axis(input.w, out.w, 1, 1, 0, 0, 1);
  for (PoolAxis* axis : {&problem.vertical, &problem.horizontal}) {
    axis->adaptive = true;
    axis->by_outputs = FastDivisor(axis->outputs);
  }
  if ((out.h + 1) * (input.h + 1) >= (int64_t{1} << 31) || (out.w + 1) * (input.w + 1) >= (int64_t{1} << 31)) {
    throw std::invalid_argument("fastcnn CUDA adaptive_avg_pool2d: input size times output size is 2^31 or larger");
  }
  const bool whole = out.h == 1 && out.w == 1 && input.n < kPixelLimit;
  run(whole ? Kind::global : Kind::mean, "adaptive_avg_pool2d", out, input, problem, device, stream);
}

}  // namespace fastcnn::cuda
