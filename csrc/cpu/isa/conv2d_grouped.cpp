// Grouped convolution with few channels a group, as many outputs as inputs (ResNeXt, depthwise), on the CPU.
//
//   y[p, k] = act(scale[k] * sum_{r,s,j} pro(x[p; r, s, g(k)*G + j]) * w[k; r, s, j] + bias[k] + residual[p, k])
//
// with G = 1, 2, 4, ... channels a group, at most one vector. Lane l of a vector of output channels needs input channel
// (l / G) * G + j for j = 0 .. G-1: always one of the same vector of input channels. So the input is read in whole
// vectors, and a permutation on the way into a register brings each lane its input: G multiply-adds a tap, none wasted.
// With three adjacent taps an input pixel is permuted once for all outputs in the row that it touches. A permutation
// takes a unit that multiplies as well, but a third of them beside the products costs these little.
//
// Layouts, with L lanes to a vector:
//   weights  [vector of channels][tap][j][L]
//   strip    [input row][pixel][L]: the rows under a task's output rows, of one vector of channels, with the prologue
//            applied and zeros for the padding at the left and right
//
// Work: a task owns some output rows x a few vectors of channels. For each of these it copies the strip (pixels of wide
// pictures lie far apart, which the inner loop would have to multiply out, and test at the borders) and computes tiles
// of up to kPixels output pixels of a row. Filter rows in the padding are left out.
//
// Kept in registers: a tile's sums, the weights of three taps and one j. In L1: the strip and the weights.
//
// Floor: 2*N*P*Q*K*R*S*G FLOPs, or one pass over input and output.

#include "conv2d_spread.h"
#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kPixels = kMicroRows >= 12 ? 14 : 8;

// One vector of channels of a task.
struct Block {
  const Conv2dProblem* problem;
  int64_t channel, lanes;  // first channel, channels that exist
};

// ---- strip ----------------------------------------------------------------------------------------------------------

// Input rows [first, last) of image n.
template <typename T>
static void fill_strip(const Block& block, int64_t n, int64_t first, int64_t last, float* strip) {
  const Conv2dProblem& problem = *block.problem;
  const TensorView& x = problem.input;
  const bool partial = block.lanes < kVectorWidth;
  const bool has_prologue = problem.has_prologue();
  Vector scale = broadcast(1.0f), shift{};
  const int64_t lanes = partial ? block.lanes : kVectorWidth;
  if (problem.input_scale != nullptr) scale = load_some(problem.input_scale + block.channel, lanes);
  if (problem.input_shift != nullptr) shift = load_some(problem.input_shift + block.channel, lanes);
  const int64_t left = problem.geometry.pad_left;
  const int64_t beyond = left + x.w < problem.strip_pixels ? left + x.w : problem.strip_pixels;
  for (int64_t h = first; h < last; ++h, strip += problem.strip_pitch) {
    const T* from = static_cast<const T*>(x.data) + (n * x.h + h) * x.w * x.pixel_stride + block.channel;
    int64_t at = 0;
    for (; at < left && at < beyond; ++at) store(strip + at * kVectorWidth, Vector{});
    if (!partial && !has_prologue) {
      for (; at < beyond; ++at, from += x.pixel_stride) store(strip + at * kVectorWidth, load(from));
    }
    for (; at < beyond; ++at, from += x.pixel_stride) {
      Vector value = partial ? load_some(from, block.lanes) : load(from);
      if (has_prologue) value = value * scale + shift;
      if (problem.input_relu) value = relu(value);
      store(strip + at * kVectorWidth, value);
    }
    for (; at < problem.strip_pixels; ++at) store(strip + at * kVectorWidth, Vector{});
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// How the taps of a filter row lie: three adjacent ones, with a stride of 1 or 2, or in any other way.
enum Taps { kThree, kThreeByTwo, kOther };

// One filter row. x: the tile's first input pixel.
template <int Group, int Pixels, int Kind>
static inline void add_taps(const Conv2dGeometry& g, const float* x, const float* weight, Vector (&sum)[Pixels]) {
  if constexpr (Kind == kOther) {
    for (int64_t s = 0; s < g.filter_w; ++s, x += g.dilation_w * kVectorWidth) {
#pragma GCC unroll 16
      for (int j = 0; j < Group; ++j, weight += kVectorWidth) {
        if constexpr (Group >= 8) __asm__("" : "+r"(x));  // as below
        const Vector factor = load(weight);
#pragma GCC unroll 14
        for (int i = 0; i < Pixels; ++i) {
          sum[i] += spread<Group>(load(x + i * g.stride_w * kVectorWidth), j) * factor;
        }
      }
    }
  } else {
    constexpr int kStride = Kind == kThree ? 1 : 2;
#pragma GCC unroll 16
    for (int j = 0; j < Group; ++j) {
      // Or the compiler keeps all pixels for the next j, more than there are registers.
      if constexpr (Group >= 8) __asm__("" : "+r"(x));
      const Vector factor[3] = {load(weight + j * kVectorWidth), load(weight + (Group + j) * kVectorWidth),
                                load(weight + (2 * Group + j) * kVectorWidth)};
#pragma GCC unroll 29
      for (int w = 0; w < (Pixels - 1) * kStride + 3; ++w) {
        const Vector input = spread<Group>(load(x + w * kVectorWidth), j);
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) {
          const int i = (w - s) / kStride;
          if (w >= s && (w - s) % kStride == 0 && i < Pixels) sum[i] += input * factor[s];
        }
      }
    }
  }
}

template <typename T, int Pixels>
static inline void finish(const Block& block, int64_t pixel, const Vector (&sum)[Pixels]) {
  const Conv2dProblem& problem = *block.problem;
  const Vector scale = load(problem.scale + block.channel), bias = load(problem.bias + block.channel);
  const bool partial = block.lanes < kVectorWidth;
#pragma GCC unroll 14
  for (int i = 0; i < Pixels; ++i) {
    Vector value = sum[i] * scale + bias;
    if (problem.residual) {
      const T* residual =
          static_cast<const T*>(problem.residual.data) + (pixel + i) * problem.residual.pixel_stride + block.channel;
      value += partial ? load_some(residual, block.lanes) : load(residual);
    }
    if (problem.relu) value = relu(value);
    T* out = static_cast<T*>(problem.out.data) + (pixel + i) * problem.out.pixel_stride + block.channel;
    if (partial) {
      store_some(out, value, block.lanes);
    } else {
      store(out, value);
    }
  }
}

// `Pixels` output pixels of a row from `pixel` on. x: their first input pixel in the first of `rows` filter rows, whose
// weights begin at `weight`.
template <int Group, int Pixels, int Kind>
static void run_tile(const Block& block, const float* x, int64_t rows, const float* weight, int64_t pixel) {
  const Conv2dProblem& problem = *block.problem;
  const Conv2dGeometry& g = problem.geometry;
  Vector sum[Pixels];
#pragma GCC unroll 14
  for (int i = 0; i < Pixels; ++i) sum[i] = Vector{};
  for (int64_t r = 0; r < rows; ++r) {
    add_taps<Group, Pixels, Kind>(g, x, weight, sum);
    x += g.dilation_h * problem.strip_pitch;
    weight += g.filter_w * Group * kVectorWidth;
  }
  if (problem.out.dtype == DType::f32) {
    finish<float>(block, pixel, sum);
  } else {
    finish<uint16_t>(block, pixel, sum);
  }
}

template <int Group, int Kind>
struct Tiles {
  using Run = void (*)(const Block&, const float*, int64_t, const float*, int64_t);
  Run by_pixels[kPixels + 1] = {};
  constexpr Tiles() { fill<kPixels>(); }
  template <int Pixels>
  constexpr void fill() {
    by_pixels[Pixels] = run_tile<Group, Pixels, Kind>;
    if constexpr (Pixels > 1) fill<Pixels - 1>();
  }
};

template <int Group, int Kind>
static void run(const Conv2dProblem& problem, int64_t n, int64_t p0, int64_t blocks_from, int64_t blocks_to,
                float* strip) {
  static constexpr Tiles<Group, Kind> kTiles;
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& x = problem.input;
  const TensorView& y = problem.out;
  const int64_t rows = y.h - p0 < problem.tile_rows ? y.h - p0 : problem.tile_rows;
  const int64_t top = p0 * g.stride_h - g.pad_top, bottom = top + problem.input_rows(rows);
  const int64_t first = top < 0 ? 0 : top, last = bottom < x.h ? bottom : x.h;
  const int64_t row_values = g.filter_w * Group * kVectorWidth;
  for (int64_t b = blocks_from; b < blocks_to; ++b) {
    const Block block = {&problem, b * kVectorWidth, x.c - b * kVectorWidth};
    const float* weights = problem.packed_weight + b * g.filter_h * row_values;
    if (x.dtype == DType::f32) {
      fill_strip<float>(block, n, first, last, strip);
    } else {
      fill_strip<uint16_t>(block, n, first, last, strip);
    }
    for (int64_t p = p0; p < p0 + rows; ++p) {
      const int64_t h = p * g.stride_h - g.pad_top;
      // Filter rows [from, to) lie in the picture.
      int64_t from = 0, to = g.filter_h;
      while (from < to && h + from * g.dilation_h < 0) ++from;
      while (to > from && h + (to - 1) * g.dilation_h >= x.h) --to;
      const float* row = strip + (h + from * g.dilation_h - first) * problem.strip_pitch;
      // Tiles of nearly equal width: 28 pixels are 14 + 14, 16 are 8 + 8.
      const int64_t tiles = (y.w + kPixels - 1) / kPixels;
      int64_t q = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t pixels = (y.w - q + tiles - tile - 1) / (tiles - tile);
        kTiles.by_pixels[pixels](block, row + q * g.stride_w * kVectorWidth, to - from, weights + from * row_values,
                                 (n * y.h + p) * y.w + q);
        q += pixels;
      }
    }
  }
}

template <int Group>
static void run(const Conv2dProblem& problem, int64_t n, int64_t p0, int64_t blocks_from, int64_t blocks_to,
                float* strip) {
  const Conv2dGeometry& g = problem.geometry;
  const bool three = g.filter_w == 3 && g.dilation_w == 1;
  if (three && g.stride_w == 1) {
    run<Group, kThree>(problem, n, p0, blocks_from, blocks_to, strip);
  } else if (three && g.stride_w == 2) {
    run<Group, kThreeByTwo>(problem, n, p0, blocks_from, blocks_to, strip);
  } else {
    run<Group, kOther>(problem, n, p0, blocks_from, blocks_to, strip);
  }
}

}  // namespace

int64_t conv2d_grouped_scratch_bytes(const Conv2dProblem& problem) {
  return problem.input_rows(problem.tile_rows) * problem.strip_pitch * 4;
}

// Tasks: (some rows of an image, part of the channels), the latter fastest.
void conv2d_grouped_task(const Conv2dProblem& problem, int64_t index, void* scratch) {
  const int64_t blocks = problem.column_blocks;
  const int64_t column_tasks = (blocks + problem.blocks_per_task - 1) / problem.blocks_per_task;
  const int64_t strips = (problem.out.h + problem.tile_rows - 1) / problem.tile_rows;  // in an image
  const int64_t from = index % column_tasks * problem.blocks_per_task;
  const int64_t to = from + problem.blocks_per_task < blocks ? from + problem.blocks_per_task : blocks;
  const int64_t n = index / column_tasks / strips, p0 = index / column_tasks % strips * problem.tile_rows;
  float* strip = static_cast<float*>(scratch);
  switch (problem.group_in) {
    case 1:
      return run<1>(problem, n, p0, from, to, strip);
    case 2:
      return run<2>(problem, n, p0, from, to, strip);
    case 4:
      return run<4>(problem, n, p0, from, to, strip);
    case 8:
      if constexpr (kVectorWidth >= 8) run<8>(problem, n, p0, from, to, strip);
      return;
    default:
      if constexpr (kVectorWidth >= 16) run<16>(problem, n, p0, from, to, strip);
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
