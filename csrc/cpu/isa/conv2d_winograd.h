// What Winograd convolution's kernels share, whatever the arithmetic of their products: conv2d_winograd.cpp says how
// the work is split and laid out.
//
// `Products` is that arithmetic. Panels and weights consist of words of 32 bits, which only it looks into: a word is an
// fp32 value, or two bf16 values of adjacent channels. A "channel vector" of a problem is a vector of words.
//
//   transform<T, M>(problem, place, phase, channel, point_stride, to)
//                         writes the vector of words that begins with that channel, of a tile of inputs, point by point
//   spread(word)          a word in every lane
//   add(sum, x, w)        sum += x * w
//   kChunkRuns            runs of channels that are summed without a break
//   kVectorChannels       channels of a vector of words
#pragma once

#include "conv2d_winograd_input.h"
#include "conv2d_winograd_points.h"
#include "table.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

// ---- products -----------------------------------------------------------------------------------------------------

struct Stream {
  const char* at;
  int64_t step;  // bytes further with every channel
};

// What is fetched beside lane `lane` of a vector of channels: into L2 both streams, into L1 the next micro-tile's
// values. The barrier keeps the compiler from moving prefetches and loads of unrolled steps together.
template <int Rows>
static inline __attribute__((always_inline)) void fetch_beside(int lane, const float* from, Stream& first,
                                                               Stream& second) {
  __builtin_prefetch(first.at, 0, 2);
  first.at += first.step;
  if (lane < (Rows * kVectorWidth + 15) / 16) {
    __builtin_prefetch(from + Rows * kVectorWidth + lane * 16);
  } else if (lane % 4 == 3) {
    __builtin_prefetch(second.at, 0, 2);
    second.at += 4 * second.step;
  }
  __asm__ volatile("" : "+r"(first.at) : : "memory");
}

// What one channel brings to tiles First to Last - 1 of a micro-tile of two vectors of columns.
template <typename Products, int First, int Last, int Rows>
static inline __attribute__((always_inline)) void add_channel(const float* from, const float* weight,
                                                              Vector (&sum)[Rows][2]) {
  const Vector w[2] = {load(weight), load(weight + kVectorWidth)};
#pragma GCC unroll 8
  for (int i = First; i < Last; ++i) {
    const Vector x = Products::spread(from + i * kVectorWidth);
    add_product(sum[i][0], x, w[0]);
    add_product(sum[i][1], x, w[1]);
  }
}

// A chunk's last vector of channels, and its sums, which go to memory few at a time: see kSpreadStores. Those of the
// first half of the tiles, complete before the others, are stored between the other half's products.
template <typename Products, int Rows>
static inline __attribute__((always_inline)) void finish_chunk(const float* from, const float* weight, bool add,
                                                               float* sums, Vector (&sum)[Rows][2], Stream& first,
                                                               Stream& second) {
  constexpr int kHalf = (Rows + 1) / 2;
  const auto add_earlier = [&](int begin, int end) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = begin; i < end; ++i) {
      sum[i][0] += load(sums + i * kColumnBlock);
      sum[i][1] += load(sums + i * kColumnBlock + kVectorWidth);
    }
  };
#pragma GCC unroll 8
  for (int lane = 0; lane < kVectorWidth; ++lane) {
    add_channel<Products, 0, kHalf>(from + lane, weight + lane * kColumnBlock, sum);
    fetch_beside<Rows>(lane, from, first, second);
  }
  if (add) add_earlier(0, kHalf);
#pragma GCC unroll 8
  for (int lane = 0; lane < kVectorWidth; ++lane) {
    add_channel<Products, kHalf, Rows>(from + lane, weight + lane * kColumnBlock, sum);
    if (lane < 2 * kHalf) store(sums + lane * kVectorWidth, sum[lane / 2][lane % 2]);
    __asm__ volatile("" ::: "memory");  // keeps the stores apart
  }
  if (add) add_earlier(kHalf, Rows);
#pragma GCC unroll 8
  for (int i = kHalf; i < Rows; ++i) {
    store(sums + i * kColumnBlock, sum[i][0]);
    store(sums + i * kColumnBlock + kVectorWidth, sum[i][1]);
  }
}

// sums[i][k] = sum_c panel[c][i] * weight[c][k] for Rows tiles; the words of one point's runs. They are summed in
// chunks that are then added up. Meanwhile what is needed later is fetched into L2.
template <typename Products, int Rows, int Vectors>
static void micro_kernel(const float* panel, int64_t vector_stride, const float* weight, const WinogradRun* runs,
                         int64_t run_count, float* sums, Stream first, Stream second) {
  constexpr bool kSpread = kSpreadStores && Vectors == 2 && Rows > 3;
  if constexpr (kSpread) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) __builtin_prefetch(sums + i * kColumnBlock, 1);
  }
  for (int64_t begin = 0; begin < run_count; begin += Products::kChunkRuns) {
    const int64_t end = run_count - begin < Products::kChunkRuns ? run_count : begin + Products::kChunkRuns;
    Vector sum[Rows][Vectors];
#pragma GCC unroll 32
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sum[i][j] = Vector{};
    }
    const bool spread = kSpread && runs[end - 1].count == kVectorWidth;
    for (int64_t run = begin; run < end - spread; ++run) {
      const float* from = panel + runs[run].vector * vector_stride + runs[run].first;
      if constexpr (kSpread) {
        if (runs[run].count == kVectorWidth) {
#pragma GCC unroll 8
          for (int lane = 0; lane < kVectorWidth; ++lane) {
            add_channel<Products, 0, Rows>(from + lane, weight + lane * kColumnBlock, sum);
            fetch_beside<Rows>(lane, from, first, second);
          }
          weight += kVectorWidth * kColumnBlock;
          continue;
        }
      }
      for (int64_t lane = 0; lane < runs[run].count; ++lane) {
        Vector w[Vectors];
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) w[j] = load(weight + j * kVectorWidth);
#pragma GCC unroll 32
        for (int i = 0; i < Rows; ++i) {
          const Vector x = Products::spread(from + i * kVectorWidth + lane);
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
    }
    if constexpr (kSpread) {
      if (spread) {
        const float* from = panel + runs[end - 1].vector * vector_stride + runs[end - 1].first;
        finish_chunk<Products>(from, weight, begin > 0, sums, sum, first, second);
        weight += kVectorWidth * kColumnBlock;
        continue;
      }
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

using MicroKernel = void (*)(const float*, int64_t, const float*, const WinogradRun*, int64_t, float*, Stream, Stream);

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
#pragma GCC unroll 8
  for (int j = 0; j < kTile; ++j) {
    Vector column[kTile], down[M];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) column[i] = load(products + (i * kTile + j) * point_stride);
    if constexpr (M == 4 && kTile == 6) {
      Points<kTile>::template output<false>(column, down);
    } else {
      Points<kTile>::output(column, down);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) half[i][j] = down[i];
  }
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
#pragma GCC unroll 3
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
  const int64_t rows = y.h - place.p < place.height ? y.h - place.p : place.height;
  const int64_t columns = y.w - place.q < place.width ? y.w - place.q : place.width;
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
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    if (i == rows) break;
    Vector across[M];
    Points<kTile>::output(half[i], across);
    if (columns == M) {
#pragma GCC unroll 6
      for (int j = 0; j < M; ++j) finish(across[j], j);
    } else {
      for (int j = 0; j < columns; ++j) finish(across[j], j);
    }
    out += y.w * y.pixel_stride;
    if (residual != nullptr) residual += y.w * added.pixel_stride;
  }
}

// Memory that is read or written row by row, for fetching it ahead.
struct Rows {
  const char* first;
  int64_t count, row_bytes, bytes;  // rows; from one to the next; of a row, those that are used

  // Part `at` of `parts`, the rows one after the other.
  const char* part(int64_t at, int64_t parts) const {
    return first + at * count / parts * row_bytes + at * count % parts * bytes / parts;
  }
  int64_t step(int64_t parts) const { return count * bytes / parts; }
};

// The input rows of a tile block. Those of whole rows of tiles make one long row; else tiles beyond the end of a row of
// tiles are left out.
static Rows input_rows(const WinogradProblem& problem, int64_t block) {
  const TensorView& x = problem.input;
  const TilePlace place = place_of(problem, block * problem.tiles_per_block);
  const int64_t stride = problem.stride, top = place.p * stride - problem.pad_top;
  const int64_t left = place.q * stride - problem.pad_left, h = top > 0 ? top : 0, w = left > 0 ? left : 0;
  const int64_t pixel = x.pixel_stride * size_in_bytes(x.dtype), row_bytes = x.w * pixel;
  const auto within = [](int64_t wanted, int64_t rest) { return rest < wanted ? (rest < 0 ? 0 : rest) : wanted; };
  const char* first = static_cast<const char*>(x.data) + (place.image * x.h + h) * row_bytes;
  const int64_t more = (problem.side - problem.tile) * stride;
  if (problem.tiles_per_block >= problem.tiles_w) {
    const int64_t tile_rows = (problem.tiles_per_block + problem.tiles_w - 1) / problem.tiles_w;
    return {first, 1, row_bytes, within(tile_rows * problem.tile * stride + more, x.h - h) * row_bytes};
  }
  const int64_t wanted = problem.tiles_per_block * problem.tile * stride + more;
  return {first + w * pixel, problem.side * stride, row_bytes, within(wanted, x.w - w) * pixel};
}

// Its output rows; those of whole rows of tiles make one long row.
static Rows output_rows(const WinogradProblem& problem, int64_t block) {
  const TensorView& y = problem.out;
  const TileBlock tiles = tile_block(problem, block);
  const TilePlace place = place_of(problem, tiles.first);
  const int64_t window = problem.max_pool ? 2 : 1;
  const int64_t p = place.p / window, q = place.q / window, tile = problem.tile / window;
  const int64_t pixel = y.pixel_stride * size_in_bytes(y.dtype), row_bytes = y.w * pixel;
  const char* first = static_cast<const char*>(y.data) + ((place.image * y.h + p) * y.w + q) * pixel;
  if (q == 0 && tiles.count >= problem.tiles_w) {
    return {first, 1, row_bytes, tiles.count / problem.tiles_w * tile * row_bytes};
  }
  const int64_t rest = y.w - q, wanted = tiles.count * tile;
  return {first, tile, row_bytes, (rest < wanted ? rest : wanted) * pixel};
}

// What is fetched into L2 while a task's products are formed: the next task's input and, where weights stay in L2 and
// need no fetching, this one's output, which would else be waited for line by line.
struct Ahead {
  Rows input, output;
  bool weights_stay;
};

// The products of `columns` column blocks from `column` on, of one tile block: point by point, so that a point's part
// of the panel comes into the near caches once for all of them. Of its `parts` column blocks the task had `part`
// before.
template <typename Products, int kTile>
static void multiply(const WinogradProblem& problem, const TileOrder& order, int64_t column, int64_t columns,
                     const float* panel, float* products, const Ahead& ahead, int64_t part, int64_t parts) {
  constexpr int kPoints = kTile * kTile;
  const int64_t* before = problem.point_words;
  const int64_t words = before[kPoints], block_weights = words * kColumnBlock;
  const int64_t panel_stride = input_point_stride(problem), product_stride = product_point_stride(problem);
  const float* weights = problem.packed_weight + column * block_weights;
  for (int point = 0; point < kPoints; ++point) {
    const int64_t count = before[point + 1] - before[point];
    const bool last_row = point / kTile == kTile - 1, last_column = point % kTile == kTile - 1;
    const WinogradRuns& runs = problem.runs[2 * last_row + last_column];
    const int64_t begin = order.begin(last_column), end = order.end(last_row, last_column);
    for (int64_t at = 0; at < columns; ++at) {
      const bool narrow = problem.out.c - (column + at) * kColumnBlock <= kVectorWidth;
      const MicroKernel* kernels = narrow ? kOneVector<Products>.by_rows : kTwoVectors<Products>.by_rows;
      // Micro-tiles of nearly equal height: 16 tiles are 8 + 8, not 14 + 2. Each fetches its part of the next weights,
      // so that reading them from memory takes its time beside the products, not before.
      const int64_t most = narrow ? MicroKernels<Products, 1>::kRows : MicroKernels<Products, 2>::kRows;
      const int64_t micro_tiles = (end - begin + most - 1) / most;
      const float* weight = weights + at * block_weights + before[point] * kColumnBlock;
      const float* following = at + 1 < columns      ? weight + block_weights
                               : point + 1 < kPoints ? weights + before[point + 1] * kColumnBlock
                                                     : weights + columns * block_weights;
      int64_t row = begin;
      Stream input{}, output{};
      for (int64_t micro = 0; micro < micro_tiles; ++micro) {
        const int64_t height = (end - row + micro_tiles - micro - 1) / (micro_tiles - micro);
        const char* next = reinterpret_cast<const char*>(following + micro * count / micro_tiles * kColumnBlock);
        if (kFewDivisions && micro > 0) {
          input.at += count * input.step, output.at += count * output.step;
        } else {
          const int64_t turn = (part * words + columns * before[point] + at * count) * micro_tiles + micro * count;
          const int64_t turns = parts * words * micro_tiles;
          input = {ahead.input.part(turn, turns), ahead.input.step(turns)};
          output = {ahead.output.part(turn, turns), ahead.output.step(turns)};
        }
        // Half of the second stream is not needed where micro-tiles share the weights.
        kernels[height](panel + point * panel_stride + row * kVectorWidth, order.count() * kVectorWidth, weight,
                        runs.data, runs.count, products + (at * kPoints + point) * product_stride + row * kColumnBlock,
                        ahead.weights_stay ? output : Stream{next, kColumnBlock * 4 / micro_tiles},
                        ahead.weights_stay || micro_tiles > 1 ? input : Stream{next + 64, kColumnBlock * 4});
        row += height;
      }
    }
  }
}

// The way back, for `columns` column blocks from `column` on: tile by tile, so that what is adjacent is written
// together.
template <int M, int kTile>
static void finish(const WinogradProblem& problem, const TileBlock& tiles, TileOrder order, int64_t column,
                   int64_t columns, const float* products) {
  const int64_t point_stride = product_point_stride(problem), first = column * kColumnBlock;
  const int64_t left = problem.out.c - first;
  const int64_t channels = left < columns * kColumnBlock ? left : columns * kColumnBlock;
  TilePlace place = place_of(problem, tiles.first);
  for (int64_t i = 0; i < tiles.count; ++i) {
    const float* tile = products + order.take(place) * kColumnBlock;
    for (int64_t k = 0; k < channels; k += kVectorWidth) {
      const Vector scale = load(problem.scale + first + k), bias = load(problem.bias + first + k);
      const float* from = tile + k / kColumnBlock * kTile * kTile * point_stride + k % kColumnBlock;
      if (problem.out.dtype == DType::f32) {
        transform_output<float, M, kTile>(problem, place, first + k, channels - k, scale, bias, from, point_stride);
      } else {
        transform_output<uint16_t, M, kTile>(problem, place, first + k, channels - k, scale, bias, from, point_stride);
      }
    }
    place = place_after(problem, place);
  }
}

static int64_t panel_floats(const WinogradProblem& problem) {
  return point_count(problem) * input_point_stride(problem);
}
static inline int64_t scratch_bytes(const WinogradProblem& problem) {
  return (panel_floats(problem) + problem.columns_at_once * point_count(problem) * product_point_stride(problem)) * 4;
}

// Tasks: (part of the column blocks, tile block), tile blocks fastest.
template <typename Products, int M, int kTile>
static void run(const WinogradProblem& problem, int64_t index, float* panel) {
  const int64_t block = index % problem.blocks, first = index / problem.blocks * problem.columns_per_task;
  const int64_t beyond = first + problem.columns_per_task;
  const int64_t last = beyond < problem.column_blocks ? beyond : problem.column_blocks;
  float* products = panel + panel_floats(problem);
  const TileBlock tiles = tile_block(problem, block);
  const TileOrder order(problem, tiles);
  transform_block<Products, kTile>(problem, tiles, order, panel);
  const int64_t weight_bytes = problem.columns_per_task * problem.point_words[kTile * kTile] * kColumnBlock * 4;
  const bool another = block + 1 < problem.blocks && !problem.one_task_each;
  const Ahead ahead = {input_rows(problem, another ? block + 1 : block), output_rows(problem, block),
                       weight_bytes <= kWeightsInL2};
  for (int64_t column = first; column < last; column += problem.columns_at_once) {
    const int64_t left = last - column, columns = left < problem.columns_at_once ? left : problem.columns_at_once;
    multiply<Products, kTile>(problem, order, column, columns, panel, products, ahead, column - first, last - first);
    finish<M, kTile>(problem, tiles, order, column, columns, products);
  }
}

}  // namespace

}  // namespace fastcnn::cpu::FASTCNN_ISA
