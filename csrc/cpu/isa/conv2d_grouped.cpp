// Grouped convolution with few channels a group, as many outputs as inputs (ResNeXt, depthwise), on the CPU.
//
//   y[p, k] = act(scale[k] * sum_{r,s,j} pro(x[p; r, s, g(k)*G + j]) * w[k; r, s, j] + bias[k] + residual[p, k])
//
// with G = 1, 2, 4, ... channels a group, at most one vector. Lane l of a vector of output channels needs input channel
// (l / G) * G + j for j = 0 .. G-1: always one of the same vector of input channels. So the input is read in whole
// vectors, and a permutation inside the register brings each lane its input: G multiply-adds a tap, none wasted,
// nothing gathered. With three adjacent taps and stride 1 an input pixel is permuted once for the three outputs it
// touches.
//
// Weights: [channel block][tap][j][kVectorWidth]. A task owns one output row x a few channel blocks; registers hold the
// accumulators of kPixels output pixels and one weight vector. Taps in the padding are skipped, per row for r and, at
// the left and right borders, per pixel for s.
//
// Floor: 2*N*P*Q*K*R*S*G FLOPs, or one pass over input and output.

#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kPixels = 8;

// Lane l takes lane (l / Group) * Group + j.
template <int Group>
static inline Vector spread(Vector x, int j) {
  if constexpr (Group == 1) return x;
  typedef int32_t Lanes __attribute__((vector_size(kVectorWidth * 4)));
#if defined(__clang__)
  Vector result;
  for (int lane = 0; lane < kVectorWidth; ++lane) result[lane] = x[lane / Group * Group + j];
  return result;
#else
  Lanes from;
  for (int lane = 0; lane < kVectorWidth; ++lane) from[lane] = lane / Group * Group + j;
  return __builtin_shuffle(x, from);
#endif
}

// The compiler may not compute anything of this value's before this point.
static inline void keep_in_register(Vector& v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
}

struct Block {
  const Conv2dProblem* problem;
  const float* weight;     // this block's taps
  int64_t channel, lanes;  // first channel, channels that exist
  Vector input_scale, input_shift;
  bool has_prologue;
  bool plain;  // whole vectors and no prologue
};

template <typename T>
static inline Vector read_input(const Block& block, const T* pixel) {
  Vector x = block.lanes < kVectorWidth ? load_some(pixel, block.lanes) : load(pixel);
  if (block.has_prologue) {
    x = x * block.input_scale + block.input_shift;
    if (block.problem->input_relu) x = relu(x);
  }
  return x;
}

template <typename T>
static inline void finish(const Block& block, int64_t pixel, Vector sum) {
  const Conv2dProblem& problem = *block.problem;
  Vector value = sum * load(problem.scale + block.channel) + load(problem.bias + block.channel);
  const bool partial = block.lanes < kVectorWidth;
  if (problem.residual) {
    const T* residual =
        static_cast<const T*>(problem.residual.data) + pixel * problem.residual.pixel_stride + block.channel;
    value += partial ? load_some(residual, block.lanes) : load(residual);
  }
  if (problem.relu) value = relu(value);
  T* out = static_cast<T*>(problem.out.data) + pixel * problem.out.pixel_stride + block.channel;
  if (partial) {
    store_some(out, value, block.lanes);
  } else {
    store(out, value);
  }
}

// Pixel (row, w), or zeros where it lies in the padding; columns are tested only where `border` says that some may.
template <typename T>
static inline Vector read_column(const Block& block, const T* row, int64_t w, bool border) {
  const TensorView& x = block.problem->input;
  if (border && (w < 0 || w >= x.w)) return Vector{};
  const T* pixel = row + w * x.pixel_stride;
  return block.plain ? load(pixel) : read_input(block, pixel);
}

// One filter row of output pixels [q, q + Pixels) for any stride, dilation and number of taps: each tap reads its
// pixels.
template <typename T, int Group, int Pixels>
static inline void add_taps(const Block& block, const T* row, const float* weight, int64_t q, bool border,
                            Vector (&sum)[Pixels]) {
  const Conv2dGeometry& g = block.problem->geometry;
  for (int64_t s = 0; s < g.filter_w; ++s, weight += Group * kVectorWidth) {
    const int64_t w0 = q * g.stride_w - g.pad_left + s * g.dilation_w;
    Vector value[Pixels];
    for (int i = 0; i < Pixels; ++i) value[i] = read_column(block, row, w0 + i * g.stride_w, border);
    // Without this GCC permutes ahead, once per branch above, and spills the results.
#pragma GCC unroll 8
    for (int i = 0; i < Pixels; ++i) keep_in_register(value[i]);
#pragma GCC unroll 16
    for (int j = 0; j < Group; ++j) {
      const Vector factor = load(weight + j * kVectorWidth);
#pragma GCC unroll 8
      for (int i = 0; i < Pixels; ++i) sum[i] += spread<Group>(value[i], j) * factor;
    }
  }
}

// The same for three adjacent taps with stride 1: an input pixel is permuted once for the three outputs that it
// touches. With 32 registers and larger groups all pixels are held: three weights are loaded for all of them, and
// neighbouring products belong to different sums.
constexpr bool kHoldsPixels = kMicroRows >= 12;

template <typename T, int Group, int Pixels>
static inline void add_three_taps(const Block& block, const T* row, const float* weight, int64_t q, bool border,
                                  Vector (&sum)[Pixels]) {
  const int64_t w0 = q - block.problem->geometry.pad_left;
  if constexpr (kHoldsPixels && Group >= 8) {
    Vector value[Pixels + 2];
    for (int w = 0; w < Pixels + 2; ++w) value[w] = read_column(block, row, w0 + w, border);
#pragma GCC unroll 16
    for (int j = 0; j < Group; ++j) {
      const Vector factor[3] = {load(weight + j * kVectorWidth), load(weight + (Group + j) * kVectorWidth),
                                load(weight + (2 * Group + j) * kVectorWidth)};
#pragma GCC unroll 10
      for (int w = 0; w < Pixels + 2; ++w) {
        keep_in_register(value[w]);
        const Vector input = spread<Group>(value[w], j);
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) {
          if (w - s >= 0 && w - s < Pixels) sum[w - s] += input * factor[s];
        }
      }
    }
    return;
  }
#pragma GCC unroll 10
  for (int w = 0; w < Pixels + 2; ++w) {
    Vector value = read_column(block, row, w0 + w, border);
    keep_in_register(value);
#pragma GCC unroll 16
    for (int j = 0; j < Group; ++j) {
      const Vector input = spread<Group>(value, j);
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        if (w - s >= 0 && w - s < Pixels) sum[w - s] += input * load(weight + (s * Group + j) * kVectorWidth);
      }
    }
  }
}

// Output pixels [q, q + Pixels) of one row.
template <typename T, int Group, int Pixels>
static void row_tile(const Block& block, const T* image, int64_t ih, int64_t first_pixel, int64_t q, bool border) {
  const Conv2dGeometry& g = block.problem->geometry;
  const TensorView& x = block.problem->input;
  const bool three_taps = g.filter_w == 3 && g.stride_w == 1 && g.dilation_w == 1;
  Vector sum[Pixels] = {};
  for (int64_t r = 0; r < g.filter_h; ++r) {
    const int64_t h = ih + r * g.dilation_h;
    if (h < 0 || h >= x.h) continue;
    const T* row = image + h * x.w * x.pixel_stride + block.channel;
    const float* weight = block.weight + r * g.filter_w * Group * kVectorWidth;
    if (three_taps) {
      add_three_taps<T, Group>(block, row, weight, q, border, sum);
    } else {
      add_taps<T, Group>(block, row, weight, q, border, sum);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Pixels; ++i) finish<T>(block, first_pixel + q + i, sum[i]);
}

template <typename T, int Group>
struct RowTiles {
  using RowTile = void (*)(const Block&, const T*, int64_t, int64_t, int64_t, bool);
  RowTile by_pixels[kPixels + 1] = {};
  constexpr RowTiles() { fill<kPixels>(); }
  template <int Pixels>
  constexpr void fill() {
    by_pixels[Pixels] = row_tile<T, Group, Pixels>;
    if constexpr (Pixels > 1) fill<Pixels - 1>();
  }
};

template <typename T, int Group>
static void run_row(const Conv2dProblem& problem, int64_t row, int64_t first_block, int64_t last_block) {
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& x = problem.input;
  const int64_t out_w = problem.out.w;
  const int64_t n = row / problem.out.h, p = row % problem.out.h;
  const T* image = static_cast<const T*>(x.data) + n * x.h * x.w * x.pixel_stride;
  const int64_t ih = p * g.stride_h - g.pad_top;
  // Columns [inside_first, inside_last) read nothing outside the image.
  const int64_t reach = (g.filter_w - 1) * g.dilation_w;
  const int64_t inside_first = (g.pad_left + g.stride_w - 1) / g.stride_w;
  const int64_t room = x.w + g.pad_left - reach - 1;
  const int64_t inside_last = room < 0 ? 0 : room / g.stride_w + 1;
  for (int64_t b = first_block; b < last_block; ++b) {
    Block block;
    block.problem = &problem;
    block.weight = problem.packed_weight + b * g.filter_h * g.filter_w * Group * kVectorWidth;
    block.channel = b * kVectorWidth;
    block.lanes = x.c - block.channel;
    block.has_prologue = problem.input_scale != nullptr || problem.input_shift != nullptr || problem.input_relu;
    block.input_scale = broadcast(1.0f);
    block.input_shift = Vector{};
    const int64_t lanes = block.lanes < kVectorWidth ? block.lanes : kVectorWidth;
    if (problem.input_scale != nullptr) {
      block.input_scale = load_some(problem.input_scale + block.channel, lanes);
    }
    if (problem.input_shift != nullptr) {
      block.input_shift = load_some(problem.input_shift + block.channel, lanes);
    }
    block.plain = !block.has_prologue && block.lanes >= kVectorWidth;
    // Tiles of nearly equal width: 14 pixels are 7 + 7, not 8 + 6.
    static constexpr RowTiles<T, Group> kTiles;
    const int64_t tiles = (out_w + kPixels - 1) / kPixels;
    int64_t q = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t pixels = (out_w - q + tiles - tile - 1) / (tiles - tile);
      const bool border = q < inside_first || q + pixels > inside_last;
      kTiles.by_pixels[pixels](block, image, ih, row * out_w, q, border);
      q += pixels;
    }
  }
}

template <typename T>
static void run(const Conv2dProblem& problem, int64_t row, int64_t first_block, int64_t last_block) {
  switch (problem.group_in) {
    case 1:
      return run_row<T, 1>(problem, row, first_block, last_block);
    case 2:
      return run_row<T, 2>(problem, row, first_block, last_block);
    case 4:
      return run_row<T, 4>(problem, row, first_block, last_block);
    case 8:
      if constexpr (kVectorWidth >= 8) run_row<T, 8>(problem, row, first_block, last_block);
      return;
    default:
      if constexpr (kVectorWidth >= 16) run_row<T, 16>(problem, row, first_block, last_block);
  }
}

}  // namespace

void conv2d_grouped_task(const Conv2dProblem& problem, int64_t index) {
  const int64_t blocks = problem.column_blocks;
  const int64_t column_tasks = (blocks + problem.blocks_per_task - 1) / problem.blocks_per_task;
  const int64_t first = index % column_tasks * problem.blocks_per_task;
  const int64_t last = first + problem.blocks_per_task < blocks ? first + problem.blocks_per_task : blocks;
  if (problem.input.dtype == DType::f32) {
    run<float>(problem, index / column_tasks, first, last);
  } else {
    run<uint16_t>(problem, index / column_tasks, first, last);
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
