// What Winograd convolution's kernels share, whatever the arithmetic of their products: conv2d_winograd.cpp says how
// the work is split and laid out.
//
// `Products` is that arithmetic. Panels and weights consist of words of 32 bits, which only it looks into: a word is an
// fp32 value, or two bf16 values of adjacent channels. A "channel vector" of a problem is a vector of words.
//
//   transform<T, M>(problem, place, v, point_stride, to)   writes channel vector v of a tile of inputs, point by point
//   spread(word)                                           a word in every lane
//   add(sum, x, w)                                         sum += x * w
//   kChunkVectors                                          channel vectors that are summed without a break
#pragma once

#include "table.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

// ---- transforms of one column -------------------------------------------------------------------------------------

template <int Side>
struct Points;

template <>
struct Points<6> {
  // b = B^T a
  static inline void input(const Vector (&a)[6], Vector (&b)[6]) {
    constexpr float p = 0.625f, q = 1.5f, pp = p * p, qq = q * q;
    const Vector even_p = a[4] - qq * a[2], odd_p = p * (a[3] - qq * a[1]);
    const Vector even_q = a[4] - pp * a[2], odd_q = q * (a[3] - pp * a[1]);
    b[0] = (pp * qq) * a[0] + (a[4] - (pp + qq) * a[2]);
    b[1] = even_p + odd_p;
    b[2] = even_p - odd_p;
    b[3] = even_q + odd_q;
    b[4] = even_q - odd_q;
    b[5] = (pp * qq) * a[1] + (a[5] - (pp + qq) * a[3]);
  }
  // b = A^T a, for 4 outputs and 2
  static inline void output(const Vector (&a)[6], Vector (&b)[4]) {
    constexpr float p = 0.625f, q = 1.5f;
    const Vector sum_p = a[1] + a[2], difference_p = a[1] - a[2];
    const Vector sum_q = a[3] + a[4], difference_q = a[3] - a[4];
    b[0] = a[0] + sum_p + sum_q;
    b[1] = p * difference_p + q * difference_q;
    b[2] = (p * p) * sum_p + (q * q) * sum_q;
    b[3] = (p * p * p) * difference_p + (q * q * q) * difference_q + a[5];
  }
  static inline void output(const Vector (&a)[6], Vector (&b)[2]) {
    b[0] = a[0] + (a[1] + a[2]) + (a[3] + a[4]);
    // In an order that leaves the compiler no choice of what to round: every kernel that inlines it gets the same bits.
    b[1] = (a[5] + 0.625f * (a[1] - a[2])) + 1.5f * (a[3] - a[4]);
  }
};

template <>
struct Points<4> {
  static inline void input(const Vector (&a)[4], Vector (&b)[4]) {
    b[0] = a[2] - a[0];
    b[1] = a[2] + a[1];
    b[2] = a[2] - a[1];
    b[3] = a[3] - a[1];
  }
  static inline void output(const Vector (&a)[4], Vector (&b)[2]) {
    b[0] = a[0] + a[1] + a[2];
    b[1] = a[1] - a[2] + a[3];
  }
};

// ---- sizes --------------------------------------------------------------------------------------------------------

struct TileBlock {
  int64_t first, count;  // tiles, numbered through the batch
};

static TileBlock tile_block(const WinogradProblem& problem, int64_t block) {
  const int64_t first = block * problem.tiles_per_block;
  const int64_t left = problem.tiles - first;
  return {first, left < problem.tiles_per_block ? left : problem.tiles_per_block};
}

// Floats from one point to the next.
static int64_t input_point_stride(const WinogradProblem& problem) {
  return (problem.channel_vectors * problem.tiles_per_block | 1) * kVectorWidth;
}
static int64_t product_point_stride(const WinogradProblem& problem) {
  return (problem.tiles_per_block * kMicroVectors | 1) * kVectorWidth;
}
static int64_t point_count(const WinogradProblem& problem) {
  return problem.side * problem.side;
}

// ---- input transform ----------------------------------------------------------------------------------------------

struct TilePlace {
  int64_t image, p, q;  // first output row and column
};

static TilePlace place_of(const WinogradProblem& problem, int64_t tile) {
  const int64_t column = tile % problem.tiles_w, row = tile / problem.tiles_w;
  return {row / problem.tiles_h, row % problem.tiles_h * problem.tile, column * problem.tile};
}

template <typename T>
static inline Vector load_lanes(const T* from, int64_t lanes) {
  return lanes < kVectorWidth ? load_some(from, lanes) : load(from);
}

// 16 (or 8, or 4) channels of one tile from `channel` on: put(i, j, values) takes point (i, j)'s.
template <typename T, int kTile, typename Put>
static inline __attribute__((always_inline)) void transform_vector(const WinogradProblem& problem, TilePlace place,
                                                                   int64_t channel, Put put) {
  const TensorView& x = problem.input;
  const int64_t h0 = place.p - problem.pad_top, w0 = place.q - problem.pad_left;
  const int64_t row_stride = x.w * x.pixel_stride;
  const int64_t origin = (place.image * x.h + h0) * row_stride + w0 * x.pixel_stride;  // may lie outside
  const bool inside = h0 >= 0 && w0 >= 0 && h0 + kTile <= x.h && w0 + kTile <= x.w;
  const bool has_prologue = problem.input_scale != nullptr || problem.input_shift != nullptr || problem.input_relu;
  const int64_t lanes = x.c - channel;
  Vector half[kTile][kTile];
  const bool plain = inside && lanes >= kVectorWidth && !has_prologue;
  Vector scale = broadcast(1.0f), shift{};
  if (problem.input_scale != nullptr) scale = load_lanes(problem.input_scale + channel, lanes);
  if (problem.input_shift != nullptr) shift = load_lanes(problem.input_shift + channel, lanes);
  for (int j = 0; j < kTile; ++j) {
    Vector column[kTile], down[kTile];
    if (plain) {
      const T* from = static_cast<const T*>(x.data) + origin + j * x.pixel_stride + channel;
#pragma GCC unroll 6
      for (int i = 0; i < kTile; ++i) column[i] = load(from + i * row_stride);
    } else {
      const bool column_inside = w0 + j >= 0 && w0 + j < x.w;
      for (int i = 0; i < kTile; ++i) {
        column[i] = Vector{};
        if (!column_inside || h0 + i < 0 || h0 + i >= x.h) continue;
        const T* from = static_cast<const T*>(x.data) + (origin + i * row_stride + j * x.pixel_stride + channel);
        Vector value = load_lanes(from, lanes);
        if (has_prologue) {
          value = value * scale + shift;
          if (problem.input_relu) value = relu(value);
        }
        column[i] = value;
      }
    }
    Points<kTile>::input(column, down);
#pragma GCC unroll 6
    for (int i = 0; i < kTile; ++i) half[i][j] = down[i];
  }
  for (int i = 0; i < kTile; ++i) {
    Vector across[kTile];
    Points<kTile>::input(half[i], across);
#pragma GCC unroll 6
    for (int j = 0; j < kTile; ++j) put(i, j, across[j]);
  }
}

template <typename Products, int kTile>
static void transform_block(const WinogradProblem& problem, int64_t block, float* to) {
  const TileBlock tiles = tile_block(problem, block);
  const int64_t vector_stride = tiles.count * kVectorWidth, point_stride = input_point_stride(problem);
  for (int64_t i = 0; i < tiles.count; ++i) {
    const TilePlace place = place_of(problem, tiles.first + i);
    for (int64_t v = 0; v < problem.channel_vectors; ++v) {
      float* first = to + i * kVectorWidth + v * vector_stride;  // of the first point
      if (problem.input.dtype == DType::f32) {
        Products::template transform<float, kTile>(problem, place, v, point_stride, first);
      } else {
        Products::template transform<uint16_t, kTile>(problem, place, v, point_stride, first);
      }
    }
  }
}

// ---- products -----------------------------------------------------------------------------------------------------

struct Stream {
  const char* at;
  int64_t step;  // bytes further with every channel
};

// sums[i][k] = sum_c panel[c][i] * weight[c][k] for Rows tiles; all channels (words) of one point. They are summed in
// chunks that are then added up. Meanwhile what is needed later is fetched into L2.
template <typename Products, int Rows, int Vectors>
static void micro_kernel(const float* panel, int64_t vector_stride, const float* weight, int64_t channel_vectors,
                         float* sums, Stream first, Stream second) {
  for (int64_t begin = 0; begin < channel_vectors; begin += Products::kChunkVectors) {
    const int64_t left = channel_vectors - begin;
    const int64_t count = left < Products::kChunkVectors ? left : Products::kChunkVectors;
    Vector sum[Rows][Vectors];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sum[i][j] = Vector{};
    }
    for (int64_t v = 0; v < count; ++v) {
      for (int64_t lane = 0; lane < kVectorWidth; ++lane) {
        Vector w[Vectors];
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) w[j] = load(weight + j * kVectorWidth);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
          const Vector x = Products::spread(panel + i * kVectorWidth + lane);
#pragma GCC unroll 2
          for (int j = 0; j < Vectors; ++j) Products::add(sum[i][j], x, w[j]);
        }
        weight += kColumnBlock;
        __builtin_prefetch(first.at, 0, 2);
        __builtin_prefetch(second.at, 0, 2);
        first.at += first.step;
        second.at += second.step;
      }
      panel += vector_stride;
    }
    if (begin > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) sum[i][j] += load(sums + i * kColumnBlock + j * kVectorWidth);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) store(sums + i * kColumnBlock + j * kVectorWidth, sum[i][j]);
    }
  }
}

using MicroKernel = void (*)(const float*, int64_t, const float*, int64_t, float*, Stream, Stream);

template <typename Products, int Vectors>
struct MicroKernels {
  MicroKernel by_rows[kMicroRows + 1] = {};
  constexpr MicroKernels() { fill<kMicroRows>(); }
  template <int Rows>
  constexpr void fill() {
    by_rows[Rows] = micro_kernel<Products, Rows, Vectors>;
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
};

template <typename Products>
constexpr MicroKernels<Products, 1> kOneVector;
template <typename Products>
constexpr MicroKernels<Products, 2> kTwoVectors;

constexpr int64_t kWeightsInL2 = 640 << 10;

// ---- output transform ---------------------------------------------------------------------------------------------

template <int M, int kTile>
static inline void transform_columns(const float* products, int64_t point_stride, Vector (&half)[M][kTile]) {
  for (int j = 0; j < kTile; ++j) {
    Vector column[kTile], down[M];
#pragma GCC unroll 6
    for (int i = 0; i < kTile; ++i) column[i] = load(products + (i * kTile + j) * point_stride);
    Points<kTile>::output(column, down);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) half[i][j] = down[i];
  }
}

// The larger one; NaN wins, as in max_pool2d.
static inline Vector larger(Vector a, Vector b) {
  return (a > b) | (a != a) ? a : b;
}

// transform_output() where `out` holds the maximum of each 2x2 window.
template <typename T, int M, int kTile>
static void transform_output_pooled(const WinogradProblem& problem, TilePlace place, int64_t channel, int64_t lanes,
                                    Vector scale, Vector bias, const float* products, int64_t point_stride) {
  Vector half[M][kTile];
  transform_columns<M, kTile>(products, point_stride, half);
  const TensorView& y = problem.out;
  const int64_t p = place.p / 2, q = place.q / 2;
  for (int i = 0; i < M / 2 && p + i < y.h; ++i) {
    Vector above[M], below[M];
    Points<kTile>::output(half[2 * i], above);
    Points<kTile>::output(half[2 * i + 1], below);
    T* out = static_cast<T*>(y.data) + ((place.image * y.h + p + i) * y.w + q) * y.pixel_stride + channel;
#pragma GCC unroll 2
    for (int j = 0; j < M / 2; ++j) {
      if (q + j >= y.w) break;
      const Vector top = larger(above[2 * j] * scale + bias, above[2 * j + 1] * scale + bias);
      const Vector bottom = larger(below[2 * j] * scale + bias, below[2 * j + 1] * scale + bias);
      Vector value = larger(top, bottom);
      if (problem.relu) value = relu(value);
      if (lanes < kVectorWidth) {
        store_some(out + j * y.pixel_stride, value, lanes);
      } else {
        store(out + j * y.pixel_stride, value);
      }
    }
  }
}

// One tile, one vector of output channels, `lanes` of them valid.
template <typename T, int M, int kTile>
static void transform_output(const WinogradProblem& problem, TilePlace place, int64_t channel, int64_t lanes,
                             Vector scale, Vector bias, const float* products, int64_t point_stride) {
  if (problem.max_pool) {
    transform_output_pooled<T, M, kTile>(problem, place, channel, lanes, scale, bias, products, point_stride);
    return;
  }
  Vector half[M][kTile];
  transform_columns<M, kTile>(products, point_stride, half);
  const TensorView& y = problem.out;
  const int64_t rows = y.h - place.p < M ? y.h - place.p : M;
  const int64_t columns = y.w - place.q < M ? y.w - place.q : M;
  for (int i = 0; i < rows; ++i) {
    Vector across[M];
    Points<kTile>::output(half[i], across);
    const int64_t pixel = (place.image * y.h + place.p + i) * y.w + place.q;
    T* out = static_cast<T*>(y.data) + pixel * y.pixel_stride + channel;
    const int64_t residual_stride = problem.residual.pixel_stride;
    const T* residual =
        problem.residual ? static_cast<const T*>(problem.residual.data) + pixel * residual_stride + channel : nullptr;
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) {
      if (j >= columns) break;
      Vector value = across[j] * scale + bias;
      if (residual != nullptr) value += load_lanes(residual + j * residual_stride, lanes);
      if (problem.relu) value = relu(value);
      if (lanes < kVectorWidth) {
        store_some(out + j * y.pixel_stride, value, lanes);
      } else {
        store(out + j * y.pixel_stride, value);
      }
    }
  }
}

// Where the input rows of a tile block begin, for fetching them ahead; tiles beyond the end of a row of tiles are left
// out.
struct InputRows {
  const char* first;
  int64_t row_bytes, bytes;  // from one row to the next; of a row, those that the block reads

  InputRows(const WinogradProblem& problem, int64_t block) {
    const TensorView& x = problem.input;
    const TilePlace place = place_of(problem, block * problem.tiles_per_block);
    const int64_t h = place.p > problem.pad_top ? place.p - problem.pad_top : 0;
    const int64_t w = place.q > problem.pad_left ? place.q - problem.pad_left : 0;
    const int64_t pixel = x.pixel_stride * size_in_bytes(x.dtype);
    const int64_t wanted = problem.tiles_per_block * problem.tile + problem.side - problem.tile, left = x.w - w;
    first = static_cast<const char*>(x.data) + ((place.image * x.h + h) * x.w + w) * pixel;
    row_bytes = x.w * pixel;
    bytes = (left < wanted ? (left < 0 ? 0 : left) : wanted) * pixel;
  }
};

// One column block of one tile block: products, then the way back. Meanwhile part `part` of `parts` of what the next
// tile block reads is fetched.
template <typename Products, int M, int kTile>
static void column_block(const WinogradProblem& problem, int64_t block, int64_t column, const float* panel,
                         float* products, const InputRows& next, int64_t part, int64_t parts) {
  constexpr int kPoints = kTile * kTile;
  const TileBlock tiles = tile_block(problem, block);
  const int64_t channels = problem.channel_vectors * kVectorWidth;
  const int64_t panel_stride = input_point_stride(problem), product_stride = product_point_stride(problem);
  const float* weight = problem.packed_weight + column * kPoints * channels * kColumnBlock;
  const int64_t first = column * kColumnBlock;
  const int64_t columns = problem.out.c - first < kColumnBlock ? problem.out.c - first : kColumnBlock;
  const MicroKernel* kernels = columns <= kVectorWidth ? kOneVector<Products>.by_rows : kTwoVectors<Products>.by_rows;
  // Micro-tiles of nearly equal height: 16 tiles are 8 + 8, not 14 + 2. Each fetches its part of the next point's
  // weights, so that reading them from memory takes its time beside the products, not before.
  const int64_t micro_tiles = (tiles.count + kMicroRows - 1) / kMicroRows;
  // Weights that stay in L2 need no fetching; nor does half of the second stream where micro-tiles share the work.
  const bool input_first = problem.columns_per_task * kPoints * channels * kColumnBlock * 4 <= kWeightsInL2;
  const int64_t input_step = next.bytes / (kTile * parts * channels * micro_tiles);
  for (int point = 0; point < kPoints; ++point) {
    const char* input =
        next.first + point / kTile * next.row_bytes + (part * kTile + point % kTile) * (next.bytes / (kTile * parts));
    int64_t row = 0;
    for (int64_t micro = 0; micro < micro_tiles; ++micro) {
      const int64_t height = (tiles.count - row + micro_tiles - micro - 1) / (micro_tiles - micro);
      const char* ahead = reinterpret_cast<const char*>(
          weight + ((point + 1) * channels + micro * channels / micro_tiles) * kColumnBlock);
      kernels[height](
          panel + point * panel_stride + row * kVectorWidth, tiles.count * kVectorWidth,
          weight + point * channels * kColumnBlock, problem.channel_vectors,
          products + point * product_stride + row * kColumnBlock, {ahead, kColumnBlock * 4 / micro_tiles},
          input_first || micro_tiles > 1 ? Stream{input, input_step} : Stream{ahead + 64, kColumnBlock * 4});
      input += channels * input_step;
      row += height;
    }
  }
  for (int64_t k = 0; k < columns; k += kVectorWidth) {
    const Vector scale = load(problem.scale + first + k), bias = load(problem.bias + first + k);
    for (int64_t i = 0; i < tiles.count; ++i) {
      const TilePlace place = place_of(problem, tiles.first + i);
      const float* from = products + i * kColumnBlock + k;
      if (problem.out.dtype == DType::f32) {
        transform_output<float, M, kTile>(problem, place, first + k, columns - k, scale, bias, from, product_stride);
      } else {
        transform_output<uint16_t, M, kTile>(problem, place, first + k, columns - k, scale, bias, from, product_stride);
      }
    }
  }
}

static int64_t panel_floats(const WinogradProblem& problem) {
  return point_count(problem) * input_point_stride(problem);
}

// Tasks: (part of the column blocks, tile block), tile blocks fastest.
template <typename Products, int M, int kTile>
static void run(const WinogradProblem& problem, int64_t index, float* panel) {
  const int64_t block = index % problem.blocks, first = index / problem.blocks * problem.columns_per_task;
  const int64_t beyond = first + problem.columns_per_task;
  const int64_t last = beyond < problem.column_blocks ? beyond : problem.column_blocks;
  float* products = panel + panel_floats(problem);
  transform_block<Products, kTile>(problem, block, panel);
  const InputRows next(problem, block + 1 < problem.blocks ? block + 1 : block);
  for (int64_t column = first; column < last; ++column) {
    column_block<Products, M, kTile>(problem, block, column, panel, products, next, column - first, last - first);
  }
}

}  // namespace

}  // namespace fastcnn::cpu::FASTCNN_ISA
