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

#include <type_traits>

#include "table.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

// ---- transforms of one column -------------------------------------------------------------------------------------

template <int Side>
struct Points;

template <>
struct Points<6> {
  static constexpr float p = 0.625f, q = 1.5f, pp = p * p, qq = q * q;
  // b = B^T a, in pairs that have terms in common: kPairs says which two of b a pair holds.
  static constexpr int kPairs[3][2] = {{0, 5}, {1, 2}, {3, 4}};
  template <int Pair>
  static inline void input(const Vector (&a)[6], Vector& first, Vector& second) {
    if constexpr (Pair == 0) {
      first = (pp * qq) * a[0] + (a[4] - (pp + qq) * a[2]);
      second = (pp * qq) * a[1] + (a[5] - (pp + qq) * a[3]);
    } else {
      constexpr float own = Pair == 1 ? p : q, other = Pair == 1 ? qq : pp;
      const Vector even = a[4] - other * a[2], odd = own * (a[3] - other * a[1]);
      first = even + odd;
      second = even - odd;
    }
  }
  // b = A^T a, for 4 outputs and 2
  static inline void output(const Vector (&a)[6], Vector (&b)[4]) {
    const Vector sum_p = a[1] + a[2], difference_p = a[1] - a[2];
    const Vector sum_q = a[3] + a[4], difference_q = a[3] - a[4];
    b[0] = a[0] + sum_p + sum_q;
    b[1] = p * difference_p + rounded(q * difference_q);
    b[2] = pp * sum_p + rounded(qq * sum_q);
    b[3] = p * pp * difference_p + rounded(q * qq * difference_q) + a[5];
  }
  static inline void output(const Vector (&a)[6], Vector (&b)[2]) {
    b[0] = a[0] + (a[1] + a[2]) + (a[3] + a[4]);
    // In an order that leaves the compiler no choice of what to round: every kernel that inlines it gets the same bits.
    b[1] = (a[5] + 0.625f * (a[1] - a[2])) + 1.5f * (a[3] - a[4]);
  }
};

template <>
struct Points<4> {
  static constexpr int kPairs[2][2] = {{0, 3}, {1, 2}};
  template <int Pair>
  static inline void input(const Vector (&a)[4], Vector& first, Vector& second) {
    first = Pair == 0 ? a[2] - a[0] : a[2] + a[1];
    second = Pair == 0 ? a[3] - a[1] : a[2] - a[1];
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

// Two rows of B^T d B: put(j, values) takes the rows' point j. The rows below it are read again for every pair of rows:
// twice as many loads as values, but what lies between the two directions stays in registers.
template <int kTile, int Pair, typename Put>
static inline __attribute__((always_inline)) void transform_rows(const float* from, int64_t row_stride,
                                                                 int64_t column_stride, Put put) {
  Vector down[2][kTile];
  constexpr int kHalf = kTile / 2;
  const float* x[2] = {from, from + kHalf * row_stride};
#pragma GCC unroll 6
  for (int j = 0; j < kTile; ++j) {
    __asm__("" : "+r"(x[0]), "+r"(x[1]), "+r"(row_stride));  // keeps the compiler from making a pointer for every pixel
    Vector column[kTile];
#pragma GCC unroll 6
    for (int i = 0; i < kTile; ++i) column[i] = load(x[i / kHalf] + i % kHalf * row_stride);
    Points<kTile>::template input<Pair>(column, down[0][j], down[1][j]);
    x[0] += column_stride, x[1] += column_stride;
  }
#pragma GCC unroll 2
  for (int row = 0; row < 2; ++row) {
    Vector across[kTile];
    Points<kTile>::template input<0>(down[row], across[Points<kTile>::kPairs[0][0]],
                                     across[Points<kTile>::kPairs[0][1]]);
    Points<kTile>::template input<1>(down[row], across[Points<kTile>::kPairs[1][0]],
                                     across[Points<kTile>::kPairs[1][1]]);
    if constexpr (kTile == 6) {
      Points<kTile>::template input<2>(down[row], across[Points<kTile>::kPairs[2][0]],
                                       across[Points<kTile>::kPairs[2][1]]);
    }
#pragma GCC unroll 6
    for (int j = 0; j < kTile; ++j) put(Points<kTile>::kPairs[Pair][row], j, across[j]);
  }
}

// A vector of channels of a tile, from `channel` on, as fp32, pixel by pixel: where the input itself does not serve,
// because it is bf16, needs the prologue, or because the tile or the vector reaches beyond its end.
template <typename T, int kTile>
static void gather_tile(const WinogradProblem& problem, const TilePlace& place, int64_t channel, float* to) {
  alignas(64) static const T zeros[kVectorWidth] = {};
  const TensorView x = problem.input;
  const int64_t h0 = place.p - problem.pad_top, w0 = place.q - problem.pad_left, lanes = x.c - channel;
  const bool input_relu = problem.input_relu;
  const bool has_prologue = problem.input_scale != nullptr || problem.input_shift != nullptr || input_relu;
  const auto outside = [](int64_t at, int64_t size) {
    return static_cast<uint64_t>(at) >= static_cast<uint64_t>(size);
  };
  const T* from = static_cast<const T*>(x.data) + ((place.image * x.h + h0) * x.w + w0) * x.pixel_stride + channel;
  if (lanes >= kVectorWidth && !has_prologue) {
    // Without branches, which would be mispredicted at every edge: what lies outside is read from `zeros`.
    uintptr_t inside[kTile];
#pragma GCC unroll 6
    for (int j = 0; j < kTile; ++j) inside[j] = outside(w0 + j, x.w) ? 0 : ~uintptr_t{0};
    const uintptr_t nothing = reinterpret_cast<uintptr_t>(zeros);
    for (int i = 0; i < kTile; ++i, from += x.w * x.pixel_stride) {
      const uintptr_t row = reinterpret_cast<uintptr_t>(from) - nothing;
      const uintptr_t row_inside = outside(h0 + i, x.h) ? 0 : ~uintptr_t{0};
#pragma GCC unroll 6
      for (int j = 0; j < kTile; ++j, to += kVectorWidth) {
        const uintptr_t pixel = row + static_cast<uintptr_t>(j * x.pixel_stride) * sizeof(T);
        store(to, load(reinterpret_cast<const T*>(nothing + (pixel & inside[j] & row_inside))));
      }
    }
    return;
  }
  Vector scale = broadcast(1.0f), shift{};
  if (problem.input_scale != nullptr) scale = load_lanes(problem.input_scale + channel, lanes);
  if (problem.input_shift != nullptr) shift = load_lanes(problem.input_shift + channel, lanes);
  for (int i = 0; i < kTile; ++i, from += x.w * x.pixel_stride) {
    for (int j = 0; j < kTile; ++j, to += kVectorWidth) {
      Vector value{};
      if (!outside(h0 + i, x.h) && !outside(w0 + j, x.w)) {
        value = load_lanes(from + j * x.pixel_stride, lanes);
        if (has_prologue) value = value * scale + shift;
        if (input_relu) value = relu(value);
      }
      store(to, value);
    }
  }
}

// 16 (or 8, or 4) channels of one tile from `channel` on: put(i, j, values) takes point (i, j)'s.
template <typename T, int kTile, typename Put>
static inline __attribute__((always_inline)) void transform_vector(const WinogradProblem& problem,
                                                                   const TilePlace& place, int64_t channel, Put put) {
  const TensorView& x = problem.input;
  const int64_t h0 = place.p - problem.pad_top, w0 = place.q - problem.pad_left;
  const bool inside = h0 >= 0 && w0 >= 0 && h0 + kTile <= x.h && w0 + kTile <= x.w;
  const bool has_prologue = problem.input_scale != nullptr || problem.input_shift != nullptr || problem.input_relu;
  alignas(64) float gathered[kTile * kTile * kVectorWidth];
  const float* from = gathered;
  int64_t row_stride = kTile * kVectorWidth, column_stride = kVectorWidth;
  bool in_place = false;
  if constexpr (std::is_same<T, float>::value) {
    in_place = inside && x.c - channel >= kVectorWidth && !has_prologue;
    if (in_place) {
      row_stride = x.w * x.pixel_stride;
      column_stride = x.pixel_stride;
      from = static_cast<const float*>(x.data) + (place.image * x.h + h0) * row_stride + w0 * column_stride + channel;
    }
  }
  if (!in_place) gather_tile<T, kTile>(problem, place, channel, gathered);
  transform_rows<kTile, 0>(from, row_stride, column_stride, put);
  transform_rows<kTile, 1>(from, row_stride, column_stride, put);
  if constexpr (kTile == 6) transform_rows<kTile, 2>(from, row_stride, column_stride, put);
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
#pragma GCC unroll 32
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sum[i][j] = Vector{};
    }
    for (int64_t v = 0; v < count; ++v) {
      for (int64_t lane = 0; lane < kVectorWidth; ++lane) {
        Vector w[Vectors];
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) w[j] = load(weight + j * kVectorWidth);
#pragma GCC unroll 32
        for (int i = 0; i < Rows; ++i) {
          const Vector x = Products::spread(panel + i * kVectorWidth + lane);
#pragma GCC unroll 2
          for (int j = 0; j < Vectors; ++j) Products::add(sum[i][j], x, w[j]);
        }
        weight += kColumnBlock;
        __builtin_prefetch(first.at, 0, 2);
        first.at += first.step;
        if (Vectors == 1) continue;  // where loads are as many as products, and half of a column block is zeros
        __builtin_prefetch(second.at, 0, 2);
        second.at += second.step;
      }
      panel += vector_stride;
    }
    if (begin > 0) {
#pragma GCC unroll 32
      for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) sum[i][j] += load(sums + i * kColumnBlock + j * kVectorWidth);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) store(sums + i * kColumnBlock + j * kVectorWidth, sum[i][j]);
    }
  }
}

using MicroKernel = void (*)(const float*, int64_t, const float*, int64_t, float*, Stream, Stream);

// One vector of columns leaves registers for twice as many tiles.
template <typename Products, int Vectors>
struct MicroKernels {
  static constexpr int kRows = kMicroRows * kMicroVectors / Vectors;
  MicroKernel by_rows[kRows + 1] = {};
  constexpr MicroKernels() { fill<kRows>(); }
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
#pragma GCC unroll 6
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
static void transform_output_pooled(const WinogradProblem& problem, const TilePlace& place, int64_t channel,
                                    int64_t lanes, Vector scale, Vector bias, const float* products,
                                    int64_t point_stride) {
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
static void transform_output(const WinogradProblem& problem, const TilePlace& place, int64_t channel, int64_t lanes,
                             Vector scale, Vector bias, const float* products, int64_t point_stride) {
  if (problem.max_pool) {
    transform_output_pooled<T, M, kTile>(problem, place, channel, lanes, scale, bias, products, point_stride);
    return;
  }
  Vector half[M][kTile];
  transform_columns<M, kTile>(products, point_stride, half);
  // Copies: a store of a vector may be to anything, as far as the compiler knows.
  const TensorView y = problem.out, added = problem.residual;
  const bool has_relu = problem.relu;
  const int64_t rows = y.h - place.p < M ? y.h - place.p : M;
  const int64_t columns = y.w - place.q < M ? y.w - place.q : M;
  const int64_t pixel = (place.image * y.h + place.p) * y.w + place.q;
  T* out = static_cast<T*>(y.data) + pixel * y.pixel_stride + channel;
  const T* residual = added ? static_cast<const T*>(added.data) + pixel * added.pixel_stride + channel : nullptr;
  const auto finish = [&](Vector value, int j) __attribute__((always_inline)) {
    value = value * scale + bias;
    if (residual != nullptr) value += load_lanes(residual + j * added.pixel_stride, lanes);
    if (has_relu) value = relu(value);
    if (lanes < kVectorWidth) {
      store_some(out + j * y.pixel_stride, value, lanes);
    } else {
      store(out + j * y.pixel_stride, value);
    }
  };
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    if (i == rows) break;
    Vector across[M];
    Points<kTile>::output(half[i], across);
    if (columns == M) {
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) finish(across[j], j);
    } else {
      for (int j = 0; j < columns; ++j) finish(across[j], j);
    }
    out += y.w * y.pixel_stride;
    if (residual != nullptr) residual += y.w * added.pixel_stride;
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
  const bool narrow = columns <= kVectorWidth;
  const MicroKernel* kernels = narrow ? kOneVector<Products>.by_rows : kTwoVectors<Products>.by_rows;
  // Micro-tiles of nearly equal height: 16 tiles are 8 + 8, not 14 + 2. Each fetches its part of the next point's
  // weights, so that reading them from memory takes its time beside the products, not before.
  const int64_t most = narrow ? MicroKernels<Products, 1>::kRows : MicroKernels<Products, 2>::kRows;
  const int64_t micro_tiles = (tiles.count + most - 1) / most;
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
