// Convolution on the CPU by Winograd's minimal filtering along rows alone: F(4, taps) in columns with a stride, F(2, 5)
// without, the plain sum over the filter's rows.
//
//   y[p, 4t..4t+3, k] = act(scale[k] * A^T [ sum_{r,c} (G w[k,c,r]) . (B^T pro(x)[c, s*p + r]) ] + bias[k] + residual)
//
// In columns a convolution of R taps with stride s is one of ceil(R/s) taps with stride 1 over the s phases of a row: a
// tile of 4 outputs is formed at ceil(R/s) + 3 points. A phase with one tap less has nothing at the point infinity. A
// 7x7 filter with stride 2 costs 7 * 13/4 products an output for every (c, k) where the sum costs 49, a 3x3 filter with
// stride 2 3 * 9/4 where the sum costs 9. That is more than tiles of 4x4 take, but transforms in one direction cost a
// fraction, enlarge rounding half as much, and weights grow less: to 13/7 and 9/3 times the plain ones. 5x5 filters
// with stride 1 have tiles of two outputs and 6 points, 5 * 6/2 products where the sum costs 25: for few input
// channels, which leave lanes of a transform in two directions empty. Max pooling of 2x2 windows is then taken on the
// way back.
//
// Layouts, with L lanes to a vector. The s * C values of s adjacent pixels are adjacent, the words of the reduction:
//   transformed input  [point][vector of words][phase of the row][row of the phase][tile][pitch]: so that the tiles of
//                      output rows that follow each other are a constant pitch apart, whatever the filter's row. pitch
//                      is L, or half of it where the words fit (three channels, stride 2: 6 of 8).
//   weights            [column block][point][filter row][word][kColumnBlock], transformed in double
//   products           [column block][point][tile][kColumnBlock]
//
// Work: a task is some output rows of an image and some column blocks. It transforms its input rows, each once, then
// for a few rows at a time forms the products by a register-blocked micro-kernel and transforms them back.
// Meanwhile the next task's input is fetched, and the next weights or, where these stay in L2, the output's lines.
//
// Kept in registers: the micro-tile's sums, two weight vectors, one broadcast. In L1: a point's weights where they are
// few. In L2: the task's transformed input, the products of a few rows. First layers' micro-tiles (stride 2 over three
// channels) may go back one by one, from L1: conv2d_winograd_row_words.h.
//
// Floor: 2*side*R*s*P*ceil(Q/4)*C*K FLOPs at the FMA rate, less what infinity saves.
#include "conv2d_winograd.h"
#include "conv2d_winograd_row_groups.h"
#include "conv2d_winograd_row_words.h"
#include "variant.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kHalfPitch = kVectorWidth == 16 ? 8 : kVectorWidth;

// ---- the transformed input ------------------------------------------------------------------------------------------

// Where things lie in it, in floats.
template <int kPitch>
struct Panel {
  explicit Panel(const WinogradRowsProblem& problem)
      : tiles(problem.tiles),
        phase_rows(problem.rows_per_task + (problem.filter - 1) / problem.stride),
        vectors((problem.words + kVectorWidth - 1) / kVectorWidth),
        vector_stride(problem.stride * phase_rows * tiles * kPitch),
        // One vector more: where tiles share vectors, the last store reaches beyond its tile. Odd, so that a tile's
        // stores do not meet in the same sets of the cache.
        point_stride((((vectors * vector_stride + kVectorWidth - 1) / kVectorWidth + 1) | 1) * kVectorWidth) {}

  int64_t row(int64_t phase, int64_t at) const { return (phase * phase_rows + at) * tiles * kPitch; }

  int64_t tiles, phase_rows, vectors, vector_stride, point_stride;
};

static bool shares_vectors(const WinogradRowsProblem& problem) {
  return kHalfPitch < kVectorWidth && problem.words <= kHalfPitch;
}

static bool has_prologue(const WinogradRowsProblem& problem) {
  return problem.input_scale != nullptr || problem.input_shift != nullptr || problem.input_relu;
}

// `count` pixels of row h of an image from column w on, as fp32, one after the other: zeros outside.
template <typename T>
static void gather_pixels(const WinogradRowsProblem& problem, int64_t image, int64_t h, int64_t w, int64_t count,
                          float* to) {
  const TensorView& x = problem.input;
  const T* row = static_cast<const T*>(x.data) + (image * x.h + h) * x.w * x.pixel_stride;
  const bool prologue = has_prologue(problem);
  for (int64_t at = w; at < w + count; ++at, to += x.c) {
    const bool inside = at >= 0 && at < x.w;
    for (int64_t c = 0; c < x.c; c += kVectorWidth) {
      const int64_t lanes = x.c - c;
      Vector value{};
      if (inside) {
        value = load_lanes(row + at * x.pixel_stride + c, lanes);
        if (prologue) {
          const Vector scale =
              problem.input_scale != nullptr ? load_lanes(problem.input_scale + c, lanes) : broadcast(1.0f);
          const Vector shift = problem.input_shift != nullptr ? load_lanes(problem.input_shift + c, lanes) : Vector{};
          value = value * scale + shift;
          if (problem.input_relu) value = relu(value);
        }
      }
      if (lanes < kVectorWidth) {
        store_some(to + c, value, lanes);
      } else {
        store(to + c, value);
      }
    }
  }
}

// Where the pixels of a row's tile lie, s * C values for each of the tile's inputs: in the input, or in `buffer`.
template <typename T, int kSide, int kTile>
static const float* tile_pixels(const WinogradRowsProblem& problem, int64_t image, int64_t h, int64_t tile,
                                float* buffer) {
  const TensorView& x = problem.input;
  const int64_t w = tile * kTile * problem.stride - problem.pad_left, count = kSide * problem.stride;
  if constexpr (std::is_same<T, float>::value) {
    if (x.pixel_stride == x.c && w >= 0 && w + count <= x.w && !has_prologue(problem)) {
      return static_cast<const float*>(x.data) + ((image * x.h + h) * x.w + w) * x.c;
    }
  }
  gather_pixels<T>(problem, image, h, w, count, buffer);
  return buffer;
}

// Whether all tiles of a row lie in the input itself: fp32 pixels without gaps, no padding, no prologue.
template <typename T, int kSide, int kTile>
static bool rows_lie_in_place(const WinogradRowsProblem& problem) {
  const int64_t columns = ((problem.tiles - 1) * kTile + kSide) * problem.stride;
  return std::is_same<T, float>::value && problem.input.pixel_stride == problem.input.c && problem.pad_left == 0 &&
         columns <= problem.input.w && !has_prologue(problem);
}

// transform_row() of `rows` such rows, where two tiles share a vector: nothing depends on where a tile lies.
template <int kSide, int kTile, int kPitch>
static void transform_rows_in_place(const WinogradRowsProblem& problem, const Panel<kPitch>& panel, const float* from,
                                    int64_t rows, float* to) {
  const int64_t words = problem.words, tile_step = kTile * words, tiles = panel.tiles;
  const int64_t row_step = problem.stride * problem.input.w * problem.input.pixel_stride;
  // What lies i steps away: 1, 2, 4 or 8 times a register, so that no pointer is needed for each.
  int64_t word1 = words, word3 = 3 * words, word5 = 5 * words;
  int64_t point1 = panel.point_stride, point3 = 3 * point1, point5 = 5 * point1;
  const auto away = [](int i, int64_t one, int64_t three, int64_t five) __attribute__((always_inline)) {
    return i == 3 ? three : i == 5 ? five : i == 6 ? 2 * three : i * one;
  };
  for (int64_t row = 0; row < rows; ++row, from += row_step, to += panel.row(0, 1)) {
    const float* first = from;
    float* out = to;
    for (int64_t tile = 0; tile < tiles; tile += 2, first += 2 * tile_step, out += 2 * kPitch) {
      const float* second = (tile + 1 < tiles ? first + tile_step : first) - kPitch;
      __asm__("" : "+r"(word1), "+r"(word3), "+r"(word5), "+r"(point1), "+r"(point3), "+r"(point5));
      Vector column[kSide], points[kSide];
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) {
        const int64_t at = away(i, word1, word3, word5);
        column[i] = load_range(load_some(first + at, words), second + at, kPitch, kPitch + words);
      }
      input_transform<kSide>(column, points);
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) store(out + away(i, point1, point3, point5), points[i]);
    }
  }
}

// B^T x of all tiles of one input row.
template <typename T, int kSide, int kTile, int kPitch>
static void transform_row(const WinogradRowsProblem& problem, const Panel<kPitch>& panel, int64_t image, int64_t h,
                          float* buffer, float* to) {
  constexpr int kShared = kVectorWidth / kPitch;
  const int64_t words = problem.words;
  for (int64_t tile = 0; tile < panel.tiles; tile += kShared) {
    const float* from[kShared];
    for (int i = 0; i < kShared; ++i) {
      const int64_t at = tile + i < panel.tiles ? tile + i : panel.tiles - 1;
      from[i] = tile_pixels<T, kSide, kTile>(problem, image, h, at, buffer + i * kSide * words);
    }
    for (int64_t v = 0; v < panel.vectors; ++v) {
      const int64_t first = v * kVectorWidth, lanes = words - first;
      Vector column[kSide], points[kSide];
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) {
        column[i] = load_lanes(from[0] + i * words + first, lanes);
        if constexpr (kShared == 2) {
          column[i] = load_range(column[i], from[1] + i * words - kPitch, kPitch, kPitch + words);
        }
      }
      input_transform<kSide>(column, points);
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) {
        store(to + i * panel.point_stride + v * panel.vector_stride + tile * kPitch, points[i]);
      }
    }
  }
}

// All that `rows` output rows from p on read.
template <typename T, int kSide, int kTile, int kPitch>
static void fill_panel(const WinogradRowsProblem& problem, const Panel<kPitch>& panel, int64_t image, int64_t p,
                       int64_t rows, float* buffer, float* to) {
  const int stride = problem.stride;
  for (int phase = 0; phase < stride && phase < problem.filter; ++phase) {
    const int64_t count = rows + (problem.filter - 1 - phase) / stride;
    const int64_t first = p * stride + phase - problem.pad_top;
    if constexpr (kPitch < kVectorWidth) {
      if (first >= 0 && first + (count - 1) * stride < problem.input.h && rows_lie_in_place<T, kSide, kTile>(problem)) {
        const TensorView& x = problem.input;
        const float* from = static_cast<const float*>(x.data) + (image * x.h + first) * x.w * x.pixel_stride;
        transform_rows_in_place<kSide, kTile, kPitch>(problem, panel, from, count, to + panel.row(phase, 0));
        continue;
      }
    }
    for (int64_t at = 0; at < count; ++at) {
      const int64_t h = (p + at) * stride + phase - problem.pad_top;
      float* row = to + panel.row(phase, at);
      if (h >= 0 && h < problem.input.h) {
        transform_row<T, kSide, kTile, kPitch>(problem, panel, image, h, buffer, row);
        continue;
      }
      for (int i = 0; i < kSide; ++i) {
        for (int64_t v = 0; v < panel.vectors; ++v) {
          float* zeros = row + i * panel.point_stride + v * panel.vector_stride;
          for (int64_t lane = 0; lane < panel.tiles * kPitch; ++lane) zeros[lane] = 0;
        }
      }
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

struct RowProducts {
  const float* panel;  // of a point, at the first tile
  int64_t vector_stride, row_stride, phase_stride;
  int filter, stride;
  int64_t words, chunk;  // of a filter row; about as many are summed without a break
  const float* weight;
  float* sums;
  Stream first, second;  // what is fetched into L2 meanwhile
};

// With few registers to a vector of words a step is so short that what it waits for shows.
constexpr bool kUnrolls = kVectorWidth == 8;
constexpr int64_t kWeightsAhead = 10 * kColumnBlock;  // that are fetched into L1

// The products of a whole vector of words; meanwhile `next`, the tiles' vector after it, is fetched into L1.
template <int Rows, int kPitch, int Vectors>
static inline __attribute__((always_inline)) void add_vector(const float* from, const float* next, const float* weight,
                                                             Vector (&sum)[Rows][Vectors]) {
#pragma GCC unroll 8
  for (int at = 0; at < Rows * kPitch; at += 16) __builtin_prefetch(next + at, 0, 3);
#pragma GCC unroll 8
  for (int lane = 0; lane < kVectorWidth; ++lane) {
    // Keeps the compiler from mixing steps, for which it has too few registers.
    __asm__("" : "+r"(from), "+r"(weight));
    __builtin_prefetch(weight + kWeightsAhead, 0, 3);
    Vector w[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) w[j] = load(weight + j * kVectorWidth);
    weight += kColumnBlock;
#pragma GCC unroll 32
    for (int i = 0; i < Rows; ++i) {
      const Vector x = broadcast(from[i * kPitch + lane]);
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) add_product(sum[i][j], x, w[j]);
    }
  }
}

// sums[i][k] = sum_{r,c} panel[r][c][i] * weight[r][c][k] for Rows tiles.
template <int Rows, int Vectors, int kPitch>
static void row_micro_kernel(const RowProducts& p) {
  const float* weight = p.weight;
  const char *first = p.first.at, *second = p.second.at;
  const int64_t first_step = p.first.step, second_step = p.second.step;
  int row = 0, phase = 0;  // the filter row is row * stride + phase
  int64_t word = 0;
  for (bool begun = false, more = true; more; begun = true) {
    Vector sum[Rows][Vectors];
#pragma GCC unroll 32
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sum[i][j] = Vector{};
    }
    for (int64_t summed = 0; more && summed < p.chunk;) {
      const int64_t left = p.words - word, count = left < kVectorWidth ? left : kVectorWidth;
      const float* from = p.panel + phase * p.phase_stride + row * p.row_stride + word / kVectorWidth * p.vector_stride;
      int64_t lane = 0;
      if constexpr (kUnrolls && Vectors == 2) {
        if (count == kVectorWidth) {
          add_vector<Rows, kPitch, Vectors>(from, from + p.vector_stride, weight, sum);
          weight += kVectorWidth * kColumnBlock;
          for (int i = 0; i < 2; ++i) {
            __builtin_prefetch(first, 0, 2);
            first += kVectorWidth / 2 * first_step;
            __builtin_prefetch(second, 0, 2);
            second += kVectorWidth / 2 * second_step;
          }
          lane = count;
        }
      }
      for (; lane < count; ++lane) {
        Vector w[Vectors];
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) w[j] = load(weight + j * kVectorWidth);
#pragma GCC unroll 32
        for (int i = 0; i < Rows; ++i) {
          const Vector x = broadcast(from[i * kPitch + lane]);
#pragma GCC unroll 2
          for (int j = 0; j < Vectors; ++j) sum[i][j] += x * w[j];
        }
        weight += kColumnBlock;
        __builtin_prefetch(first, 0, 2);
        first += first_step;
        if (Vectors == 1) continue;
        __builtin_prefetch(second, 0, 2);
        second += second_step;
      }
      summed += count;
      word += count;
      if (word < p.words) continue;
      word = 0;
      if (++phase == p.stride) phase = 0, ++row;
      more = row * p.stride + phase < p.filter;
    }
#pragma GCC unroll 32
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) {
        float* to = p.sums + i * kColumnBlock + j * kVectorWidth;
        store(to, begun ? load(to) + sum[i][j] : sum[i][j]);
      }
    }
  }
}

using RowMicroKernel = void (*)(const RowProducts&);

template <int Vectors, int kPitch>
struct RowMicroKernels {
  static constexpr int kRows = kMicroRows * kMicroVectors / Vectors;
  RowMicroKernel by_rows[kRows + 1] = {};
  constexpr RowMicroKernels() { fill<kRows>(); }
  template <int Rows>
  constexpr void fill() {
    by_rows[Rows] = row_micro_kernel<Rows, Vectors, kPitch>;
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
};

template <int kPitch>
constexpr RowMicroKernels<1, kPitch> kOneColumnVector;
template <int kPitch>
constexpr RowMicroKernels<2, kPitch> kTwoColumnVectors;

// Sums of a product in fp32 lose digits with their length, and the way back enlarges what is lost, the more points
// there are.
template <int kSide>
constexpr int64_t kChunkWords = kSide == 7 ? 24 : 64;

// Whether the kernels of conv2d_winograd_row_groups.h form all products, in one chunk. These are a vector each.
static bool in_row_groups(const WinogradRowsProblem& problem) {
  return problem.stride == 1 && problem.filter == kGroupTaps && problem.words <= kVectorWidth &&
         problem.words * kGroupTaps <= kChunkWords<kGroupTaps + 1> && problem.out.c <= kVectorWidth;
}

// Memory that is fetched ahead while products are formed, bit by bit.
struct Span {
  const char* first;
  int64_t bytes;

  Span part(int64_t at, int64_t parts) const { return {first + at * bytes / parts, bytes / parts}; }
  Stream stream(int64_t turn, int64_t turns) const { return {first + turn * bytes / turns, bytes / turns}; }
};

// The next task's input, and where weights stay in L2 and need no fetching, the output that the products make.
struct RowsAhead {
  Span input, output;
  bool weights_stay;
};

// The products of `count` tiles from `tile` on and one column block.
template <int kSide, int kPitch>
static void multiply_rows(const WinogradRowsProblem& problem, const Panel<kPitch>& panel, const float* input,
                          int64_t tile, int64_t count, int64_t column, float* products, const RowsAhead& ahead) {
  const int64_t columns = problem.out.c - column * kColumnBlock;
  const bool narrow = columns <= kVectorWidth;
  const RowMicroKernel* kernels = narrow ? kOneColumnVector<kPitch>.by_rows : kTwoColumnVectors<kPitch>.by_rows;
  const int64_t most = narrow ? RowMicroKernels<1, kPitch>::kRows : RowMicroKernels<2, kPitch>::kRows;
  const int64_t micro_tiles = (count + most - 1) / most;
  const int64_t product_stride = count * kColumnBlock;
  const int64_t depth = problem.filter * problem.words, last_depth = problem.filter * problem.last_words;
  const int64_t all = (kSide - 1) * depth + last_depth;
  const float* weight = problem.packed_weight + column * all * kColumnBlock;
  RowProducts p;
  p.vector_stride = panel.vector_stride;
  p.row_stride = panel.row(0, 1);
  p.phase_stride = panel.row(1, 0);
  p.filter = problem.filter;
  p.stride = problem.stride;
  p.chunk = kChunkWords<kSide>;
  for (int point = 0; point < kSide; ++point) {
    const bool last = point == kSide - 1;
    const int64_t words = last ? last_depth : depth;
    p.words = last ? problem.last_words : problem.words;
    p.weight = weight + point * depth * kColumnBlock;
    int64_t row = 0;
    for (int64_t micro = 0; micro < micro_tiles; ++micro) {
      const int64_t height = (count - row + micro_tiles - micro - 1) / (micro_tiles - micro);
      p.panel = input + point * panel.point_stride + (tile + row) * kPitch;
      p.sums = products + point * product_stride + row * kColumnBlock;
      const int64_t turns = all * micro_tiles, turn = point * depth * micro_tiles + micro * words;
      const char* next = reinterpret_cast<const char*>(p.weight + (words + micro * words / micro_tiles) * kColumnBlock);
      // Half of the second stream is not needed where micro-tiles share the weights.
      p.first = ahead.weights_stay ? ahead.output.stream(turn, turns) : Stream{next, kColumnBlock * 4 / micro_tiles};
      p.second =
          ahead.weights_stay || micro_tiles > 1 ? ahead.input.stream(turn, turns) : Stream{next + 64, kColumnBlock * 4};
      kernels[height](p);
      row += height;
    }
  }
}

// The same by groups of output rows, for all tiles of `rows` rows from `row` on.
template <int kSide, int kPitch>
static void multiply_rows_in_groups(const WinogradRowsProblem& problem, const Panel<kPitch>& panel, const float* input,
                                    int64_t row, int64_t rows, float* products) {
  RowGroup group;
  group.row_stride = panel.row(0, 1);
  group.words = problem.words;
  group.sums_row_stride = problem.tiles * kVectorWidth;
  for (int point = 0; point < kSide; ++point) {
    group.panel = input + point * panel.point_stride + panel.row(0, row);
    group.weight = problem.packed_weight + point * problem.filter * problem.words * kColumnBlock;
    group.sums = products + point * rows * group.sums_row_stride;
    multiply_row_groups<kPitch>(group, rows, problem.tiles);
  }
}

// ---- the way back ---------------------------------------------------------------------------------------------------

// A tile's outputs from its products.
template <int kSide, int kTile>
static inline __attribute__((always_inline)) void tile_outputs(const float* products, int64_t point_stride,
                                                               Vector (&values)[kTile]) {
  Vector at[kSide];
#pragma GCC unroll 8
  for (int point = 0; point < kSide; ++point) at[point] = load(products + point * point_stride);
  Points<kSide>::output(at, values);
}

// finish_rows() where `out` holds the maximum of each 2x2 window: a tile of each of two rows.
template <typename T, int kSide>
static void finish_rows_pooled(const WinogradRowsProblem& problem, int64_t image, int64_t p, int64_t rows,
                               int64_t column, int64_t columns, const float* products) {
  const TensorView y = problem.out;
  const bool has_relu = problem.relu;
  const int64_t pitch = in_row_groups(problem) ? kVectorWidth : kColumnBlock;
  const int64_t tiles = problem.tiles, point_stride = rows * tiles * pitch;
  const int64_t first = column * kColumnBlock, left = y.c - first;
  const int64_t channels = left < columns * kColumnBlock ? left : columns * kColumnBlock;
  for (int64_t k = 0; k < channels; k += kVectorWidth) {
    const Vector scale = load(problem.scale + first + k), bias = load(problem.bias + first + k);
    const int64_t lanes = channels - k;
    const float* block = products + k / kColumnBlock * kSide * point_stride + k % kColumnBlock;
    for (int64_t row = 0; row < rows; row += 2) {
      T* out = static_cast<T*>(y.data) + (image * y.h + (p + row) / 2) * y.w * y.pixel_stride + first + k;
      for (int64_t tile = 0; tile < tiles; ++tile, out += y.pixel_stride) {
        const float* from = block + (row * tiles + tile) * pitch;
        Vector upper[2], lower[2];
        tile_outputs<kSide>(from, point_stride, upper);
        tile_outputs<kSide>(from + tiles * pitch, point_stride, lower);
        Vector value = larger(larger(upper[0] * scale + bias, upper[1] * scale + bias),
                              larger(lower[0] * scale + bias, lower[1] * scale + bias));
        if (has_relu) value = relu(value);
        if (lanes < kVectorWidth) {
          store_some(out, value, lanes);
        } else {
          store(out, value);
        }
      }
    }
  }
}

template <typename T, int kSide, int kTile>
static void finish_rows(const WinogradRowsProblem& problem, int64_t image, int64_t p, int64_t rows, int64_t column,
                        int64_t columns, const float* products) {
  const TensorView y = problem.out, added = problem.residual;
  const bool has_relu = problem.relu;
  const int64_t pitch = in_row_groups(problem) ? kVectorWidth : kColumnBlock;
  const int64_t tiles = problem.tiles, point_stride = rows * tiles * pitch;
  const int64_t first = column * kColumnBlock, left = y.c - first;
  const int64_t channels = left < columns * kColumnBlock ? left : columns * kColumnBlock;
  for (int64_t i = 0; i < rows * tiles; ++i) {
    const int64_t q = i % tiles * kTile, pixel = (image * y.h + p + i / tiles) * y.w + q;
    const int64_t width = y.w - q < kTile ? y.w - q : kTile;
    for (int64_t k = 0; k < channels; k += kVectorWidth) {
      const Vector scale = load(problem.scale + first + k), bias = load(problem.bias + first + k);
      const int64_t lanes = channels - k;
      const float* from = products + k / kColumnBlock * kSide * point_stride + i * pitch + k % kColumnBlock;
      Vector values[kTile];
      tile_outputs<kSide>(from, point_stride, values);
      T* out = static_cast<T*>(y.data) + pixel * y.pixel_stride + first + k;
      const T* residual = added ? static_cast<const T*>(added.data) + pixel * added.pixel_stride + first + k : nullptr;
      const auto put = [&](int j) __attribute__((always_inline)) {
        Vector value = values[j] * scale + bias;
        if (residual != nullptr) value += load_lanes(residual + j * added.pixel_stride, lanes);
        if (has_relu) value = relu(value);
        if (lanes < kVectorWidth) {
          store_some(out + j * y.pixel_stride, value, lanes);
        } else {
          store(out + j * y.pixel_stride, value);
        }
      };
      if (width == kTile) {
#pragma GCC unroll 4
        for (int j = 0; j < kTile; ++j) put(j);
      } else {
        for (int j = 0; j < width; ++j) put(j);
      }
    }
  }
}

// ---- few words ------------------------------------------------------------------------------------------------------

// Where a micro-tile's outputs go: of each tile the first pixel of the batch, and how many there are.
struct RowWordsPlaces {
  int64_t pixel[kMicroRows], width[kMicroRows];
};

// Outputs of `count` tiles of whole vectors of a column block's fp32 channels. products: [point][tile][kColumnBlock].
template <int kSide>
static void finish_tiles(const WinogradRowsProblem& problem, const RowWordsPlaces& places, int64_t count,
                         int64_t column, const float* products) {
  const TensorView y = problem.out, added = problem.residual;
  const bool has_relu = problem.relu;
  const int64_t first = column * kColumnBlock;
  for (int64_t k = 0; k < kColumnBlock && first + k < y.c; k += kVectorWidth) {
    const Vector scale = load(problem.scale + first + k), bias = load(problem.bias + first + k);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t pixel = places.pixel[i];
      Vector values[4];
      tile_outputs<kSide>(products + i * kColumnBlock + k, kMicroRows * kColumnBlock, values);
      float* out = static_cast<float*>(y.data) + pixel * y.pixel_stride + first + k;
      const float* residual = nullptr;
      if (added) residual = static_cast<const float*>(added.data) + pixel * added.pixel_stride + first + k;
      const auto put = [&](int j) __attribute__((always_inline)) {
        Vector value = values[j] * scale + bias;
        if (residual != nullptr) value += load(residual + j * added.pixel_stride);
        if (has_relu) value = relu(value);
        store(out + j * y.pixel_stride, value);
      };
      if (places.width[i] == 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) put(j);
      } else {
        for (int j = 0; j < places.width[i]; ++j) put(j);
      }
    }
  }
}

// All `rows` rows of one column block, micro-tile by micro-tile: the products at all points, then the way back while
// they are in L1, as the block's weights are. The outputs' lines are fetched meanwhile.
template <int kSide, int kPitch>
static void multiply_and_finish_rows(const WinogradRowsProblem& problem, const Panel<kPitch>& panel, const float* input,
                                     int64_t image, int64_t p, int64_t rows, int64_t column) {
  alignas(64) float products[kSide * kMicroRows * kColumnBlock];
  const TensorView& y = problem.out;
  const int64_t depth = problem.filter * problem.words, last_depth = problem.filter * problem.last_words;
  const int64_t tiles = rows * problem.tiles, micro_tiles = (tiles + kMicroRows - 1) / kMicroRows;
  RowWords words;
  words.row_stride = panel.row(0, 1);
  words.phase_stride = panel.row(1, 0);
  words.filter = problem.filter;
  int64_t row = 0, q = 0;
  for (int64_t micro = 0, tile = 0; micro < micro_tiles; ++micro) {
    const int64_t count = (tiles - tile + micro_tiles - micro - 1) / (micro_tiles - micro);
    RowWordsPlaces places;
    for (int64_t i = 0; i < count; ++i) {
      places.pixel[i] = (image * y.h + p + row) * y.w + q;
      places.width[i] = y.w - q < 4 ? y.w - q : 4;
      q += 4;
      if (q >= y.w) q = 0, ++row;
    }
    words.weight = problem.packed_weight + column * ((kSide - 1) * depth + last_depth) * kColumnBlock;
    for (int point = 0; point < kSide; ++point) {
      words.panel = input + point * panel.point_stride + tile * kPitch;
      words.sums = products + point * kMicroRows * kColumnBlock;
      if (point < count) {
        const float* out =
            static_cast<const float*>(y.data) + places.pixel[point] * y.pixel_stride + column * kColumnBlock;
        for (int64_t j = 0; j < places.width[point]; ++j) __builtin_prefetch(out + j * y.pixel_stride, 1, 3);
      }
      const auto multiply = point == kSide - 1 ? kHalfRowWords.by_tiles[count] : kWholeRowWords.by_tiles[count];
      multiply(words);
      words.weight += depth * kColumnBlock;
    }
    finish_tiles<kSide>(problem, places, count, column, products);
    tile += count;
  }
}

// ---- tasks ----------------------------------------------------------------------------------------------------------

// Scratch: the transformed input, the products, pixels of the tiles that are gathered.
template <int kPitch>
static int64_t panel_floats(const WinogradRowsProblem& problem) {
  return problem.side * Panel<kPitch>(problem).point_stride;
}
static int64_t product_floats(const WinogradRowsProblem& problem) {
  return problem.columns_at_once * problem.side * problem.rows_at_once * problem.tiles * kColumnBlock;
}

template <typename T, int kSide, int kTile, int kPitch>
static void run_rows(const WinogradRowsProblem& problem, int64_t index, float* scratch) {
  const int64_t blocks = problem.out.n * problem.blocks_per_image;
  const int64_t block = index % blocks, first = index / blocks * problem.columns_per_task;
  const int64_t beyond = first + problem.columns_per_task;
  const int64_t last = beyond < problem.column_blocks ? beyond : problem.column_blocks;
  const int64_t image = block / problem.blocks_per_image;
  const int64_t p = block % problem.blocks_per_image * problem.rows_per_task;
  const int64_t height = problem.max_pool ? 2 * problem.out.h : problem.out.h;
  const int64_t below = height - p, rows = below < problem.rows_per_task ? below : problem.rows_per_task;
  const Panel<kPitch> panel(problem);
  float* input = scratch;
  float* products = input + panel_floats<kPitch>(problem);
  fill_panel<T, kSide, kTile, kPitch>(problem, panel, image, p, rows, products + product_floats(problem), input);
  if constexpr (kRowWords && kTile == 4) {
    if (has_row_words(problem)) {
      for (int64_t column = first; column < last; ++column) {
        multiply_and_finish_rows<kSide, kPitch>(problem, panel, input, image, p, rows, column);
      }
      return;
    }
  }

  const TensorView &x = problem.input, &y = problem.out;
  const int64_t words = problem.filter * ((kSide - 1) * problem.words + problem.last_words);
  const int64_t in_bytes = x.w * x.pixel_stride * size_in_bytes(x.dtype);
  const int64_t out_bytes = y.w * y.pixel_stride * size_in_bytes(y.dtype);
  const Span next = {static_cast<const char*>(x.data) +
                         (image * x.h + (p + rows - 1) * problem.stride + problem.filter - problem.pad_top) * in_bytes,
                     rows * problem.stride * in_bytes};
  for (int64_t row = 0; row < rows; row += problem.rows_at_once) {
    const int64_t at_once = rows - row < problem.rows_at_once ? rows - row : problem.rows_at_once;
    const int64_t unit = problem.max_pool ? 2 : 1;  // rows of an output row
    const Span output = {static_cast<const char*>(y.data) + (image * y.h + (p + row) / unit) * out_bytes,
                         at_once / unit * out_bytes};
    RowsAhead ahead;
    ahead.weights_stay = (last - first) * words * kColumnBlock * 4 <= kWeightsInL2;
    for (int64_t column = first; column < last; column += problem.columns_at_once) {
      const int64_t left = last - column, columns = left < problem.columns_at_once ? left : problem.columns_at_once;
      for (int64_t i = 0; i < columns; ++i) {
        ahead.output = output.part(column + i - first, last - first);
        ahead.input = next.part(row * (last - first) + at_once * (column + i - first), rows * (last - first));
        ahead.input.bytes *= at_once;
        float* to = products + i * kSide * at_once * problem.tiles * kColumnBlock;
        if constexpr (kTile == 2) {
          if (in_row_groups(problem)) {
            multiply_rows_in_groups<kSide>(problem, panel, input, row, at_once, to);
            continue;
          }
        }
        multiply_rows<kSide, kPitch>(problem, panel, input, row * problem.tiles, at_once * problem.tiles, column + i,
                                     to, ahead);
      }
      if constexpr (kTile == 2) {
        if (problem.max_pool) {
          finish_rows_pooled<T, kSide>(problem, image, p + row, at_once, column, columns, products);
          continue;
        }
      }
      finish_rows<T, kSide, kTile>(problem, image, p + row, at_once, column, columns, products);
    }
  }
}

template <typename T, int kSide, int kTile>
static void run_rows_of(const WinogradRowsProblem& problem, int64_t index, float* scratch) {
  if (shares_vectors(problem)) return run_rows<T, kSide, kTile, kHalfPitch>(problem, index, scratch);
  run_rows<T, kSide, kTile, kVectorWidth>(problem, index, scratch);
}

template <typename T>
static void run_rows_by_side(const WinogradRowsProblem& problem, int64_t index, float* scratch) {
  if (problem.stride == 1) return run_rows_of<T, 6, winograd_row_tile(1)>(problem, index, scratch);
  constexpr int kTile = winograd_row_tile(2);
  if (problem.side == 5) return run_rows_of<T, 5, kTile>(problem, index, scratch);
  if (problem.side == 6) return run_rows_of<T, 6, kTile>(problem, index, scratch);
  run_rows_of<T, 7, kTile>(problem, index, scratch);
}

}  // namespace

int64_t winograd_rows_scratch_bytes(const WinogradRowsProblem& problem) {
  const int64_t panel =
      shares_vectors(problem) ? panel_floats<kHalfPitch>(problem) : panel_floats<kVectorWidth>(problem);
  return (panel + product_floats(problem) + 2 * problem.side * problem.words + kVectorWidth) * 4;
}

void winograd_rows_task(const WinogradRowsProblem& problem, int64_t index, void* scratch) {
  if (problem.input.dtype == DType::f32) {
    run_rows_by_side<float>(problem, index, static_cast<float*>(scratch));
  } else {
    run_rows_by_side<uint16_t>(problem, index, static_cast<float*>(scratch));
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
