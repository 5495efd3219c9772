// The way into Winograd's domain: where tiles lie, how they are read (prologue, zero padding, phases of a stride), and
// their transform, B^T x B. See conv2d_winograd.cpp.
#pragma once

#include <type_traits>

#include "conv2d_winograd_points.h"
#include "table.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

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
  int64_t image, p, q;    // first output row and column
  int64_t height, width;  // outputs, of which some may lie beyond the end
};

// Where short tiles begin, in outputs of a row or column of tiles.
static int64_t short_from_p(const WinogradProblem& problem) {
  return (problem.tiles_h - problem.short_h) * problem.tile;
}
static int64_t short_from_q(const WinogradProblem& problem) {
  return (problem.tiles_w - problem.short_w) * problem.tile;
}

static TilePlace place_of(const WinogradProblem& problem, int64_t tile) {
  const int64_t column = tile % problem.tiles_w, row = tile / problem.tiles_w % problem.tiles_h;
  const int64_t late_rows = row - (problem.tiles_h - problem.short_h),
                late = column - (problem.tiles_w - problem.short_w);
  TilePlace place = {tile / problem.tiles_w / problem.tiles_h, row * problem.tile, column * problem.tile, problem.tile,
                     problem.tile};
  if (late_rows >= 0) place.p -= late_rows, --place.height;
  if (late >= 0) place.q -= late, --place.width;
  return place;
}

// The next tile's.
static TilePlace place_after(const WinogradProblem& problem, TilePlace place) {
  place.q += place.width;
  if (place.q < problem.tiles_w * problem.tile - problem.short_w) {
    if (place.q == short_from_q(problem)) --place.width;
    return place;
  }
  place.q = 0;
  place.width = problem.tile - (problem.short_w == problem.tiles_w);
  place.p += place.height;
  if (place.p < problem.tiles_h * problem.tile - problem.short_h) {
    if (place.p == short_from_p(problem)) --place.height;
    return place;
  }
  return {place.image + 1, 0, 0, problem.tile - (problem.short_h == problem.tiles_h), place.width};
}

// The order of a block's tiles in its panel and products: first those that are short in width alone, then whole ones,
// then those short in height alone, then those short in both. So the tiles that have a point lie side by side.
class TileOrder {
 public:
  TileOrder(const WinogradProblem& problem, const TileBlock& tiles) : tile_(problem.tile), count_(tiles.count) {
    int64_t of_kind[4] = {tiles.count, 0, 0, 0};
    if (problem.short_h + problem.short_w > 0) {
      of_kind[kWhole] = 0;
      TilePlace place = place_of(problem, tiles.first);
      for (int64_t i = 0; i < tiles.count; ++i, place = place_after(problem, place)) ++of_kind[kind(place)];
    }
    next_[kShortWidth] = 0;
    next_[kWhole] = whole_ = of_kind[kShortWidth];
    next_[kShortHeight] = short_height_ = whole_ + of_kind[kWhole];
    next_[kShortBoth] = short_both_ = short_height_ + of_kind[kShortHeight];
  }
  // The place of the next tile, when all are asked for one after the other.
  int64_t take(const TilePlace& place) { return next_[kind(place)]++; }
  int64_t count() const { return count_; }
  // The tiles that have a point of the last row, of the last column, of both.
  int64_t begin(bool last_column) const { return last_column ? whole_ : 0; }
  int64_t end(bool last_row, bool last_column) const {
    return last_row ? short_height_ : last_column ? short_both_ : count_;
  }

 private:
  enum Kind { kWhole, kShortWidth, kShortHeight, kShortBoth };
  Kind kind(const TilePlace& place) const {
    return static_cast<Kind>(2 * (place.height < tile_) + (place.width < tile_));
  }
  int64_t tile_, count_, whole_, short_height_, short_both_;
  int64_t next_[4];
};

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
#pragma GCC unroll 8
  for (int j = 0; j < kTile; ++j) {
    __asm__("" : "+r"(x[0]), "+r"(x[1]), "+r"(row_stride));  // keeps the compiler from making a pointer for every pixel
    Vector column[kTile];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) column[i] = load(x[i / kHalf] + i % kHalf * row_stride);
    Points<kTile>::template input<Pair>(column, down[0][j], down[1][j]);
    x[0] += column_stride, x[1] += column_stride;
  }
#pragma GCC unroll 2
  for (int row = 0; row < 2; ++row) {
    Vector across[kTile];
    input_transform<kTile>(down[row], across);
#pragma GCC unroll 8
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
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) inside[j] = outside(w0 + j, x.w) ? 0 : ~uintptr_t{0};
    const uintptr_t nothing = reinterpret_cast<uintptr_t>(zeros);
    for (int i = 0; i < kTile; ++i, from += x.w * x.pixel_stride) {
      const uintptr_t row = reinterpret_cast<uintptr_t>(from) - nothing;
      const uintptr_t row_inside = outside(h0 + i, x.h) ? 0 : ~uintptr_t{0};
#pragma GCC unroll 8
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
  if constexpr (kTile >= 6) transform_rows<kTile, 2>(from, row_stride, column_stride, put);
  if constexpr (kTile == 8) transform_rows<kTile, 3>(from, row_stride, column_stride, put);
}

// ---- with a stride

// A phase of the input: every stride-th row and column of it, from (row, column) on.
struct Phase {
  int row, column;
};

static inline bool has_prologue(const WinogradProblem& problem) {
  return problem.input_scale != nullptr || problem.input_shift != nullptr || problem.input_relu;
}

// Reads a tile of one phase: a vector of channels, from `channel` on, of each pixel.
template <typename T, int kTile>
class ChannelReader {
 public:
  ChannelReader(const WinogradProblem& problem, const TilePlace& place, Phase phase, int64_t channel)
      : problem_(problem), x_(problem.input), step_(problem.stride), lanes_(x_.c - channel) {
    h0_ = place.p * step_ - problem.pad_top + phase.row;
    w0_ = place.q * step_ - problem.pad_left + phase.column;
    row_stride_ = step_ * x_.w * x_.pixel_stride;
    column_stride_ = step_ * x_.pixel_stride;
    origin_ = ((place.image * x_.h + h0_) * x_.w + w0_) * x_.pixel_stride + channel;  // may lie outside
    const int64_t reach = (kTile - 1) * step_;
    const bool inside = h0_ >= 0 && w0_ >= 0 && h0_ + reach < x_.h && w0_ + reach < x_.w;
    prologue_ = has_prologue(problem);
    plain_ = inside && lanes_ >= kVectorWidth && !prologue_;
    if (problem.input_scale != nullptr) scale_ = load_lanes(problem.input_scale + channel, lanes_);
    if (problem.input_shift != nullptr) shift_ = load_lanes(problem.input_shift + channel, lanes_);
  }

  inline __attribute__((always_inline)) void read_column(int j, Vector (&column)[kTile]) const {
    const T* data = static_cast<const T*>(x_.data);
    if (plain_) {
      const T* from = data + origin_ + j * column_stride_;
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) column[i] = load(from + i * row_stride_);
      return;
    }
    const int64_t w = w0_ + j * step_;
    const bool column_inside = w >= 0 && w < x_.w;
    for (int i = 0; i < kTile; ++i) {
      column[i] = Vector{};
      const int64_t h = h0_ + i * step_;
      if (!column_inside || h < 0 || h >= x_.h) continue;
      Vector value = load_lanes(data + (origin_ + i * row_stride_ + j * column_stride_), lanes_);
      if (prologue_) {
        value = value * scale_ + shift_;
        if (problem_.input_relu) value = relu(value);
      }
      column[i] = value;
    }
  }

 private:
  const WinogradProblem& problem_;
  const TensorView& x_;
  int64_t step_, lanes_, h0_, w0_, row_stride_, column_stride_, origin_;
  bool prologue_, plain_;
  Vector scale_ = broadcast(1.0f), shift_{};
};

// Reads a tile of several phases at once, where pixels of few channels lie without gaps: the `stride` pixels of a row
// that belong together are adjacent, and a vector holds those of some adjacent rows, from `first_row` on.
template <typename T, int kTile>
class RowReader {
 public:
  RowReader(const WinogradProblem& problem, const TilePlace& place, int first_row)
      : problem_(problem), x_(problem.input), step_(problem.stride) {
    const int left = problem.stride - first_row;
    rows_ = problem.rows_per_vector < left ? problem.rows_per_vector : left;
    run_ = static_cast<int>(step_ * x_.c);
    h0_ = place.p * step_ - problem.pad_top + first_row;
    w0_ = place.q * step_ - problem.pad_left;
    image_ = place.image;
    plain_ = x_.pixel_stride == x_.c && !has_prologue(problem);
    const int64_t reach = (kTile - 1) * step_;
    inside_ = h0_ >= 0 && h0_ + reach + rows_ <= x_.h && w0_ >= 0 && w0_ + reach + step_ <= x_.w;
  }

  inline __attribute__((always_inline)) void read_column(int j, Vector (&column)[kTile]) const {
    const int64_t w = w0_ + j * step_;
    const T* data = static_cast<const T*>(x_.data) + ((image_ * x_.h + h0_) * x_.w + w) * x_.pixel_stride;
    const int64_t row_stride = x_.w * x_.pixel_stride;
    if (plain_ && inside_) {
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) {
        const T* from = data + i * step_ * row_stride;
        Vector value = load_range(Vector{}, from, 0, run_);
        for (int r = 1; r < rows_; ++r) {
          value = load_range(value, from + r * (row_stride - run_), r * run_, (r + 1) * run_);
        }
        column[i] = value;
      }
      return;
    }
    // Of a row's pixels those from `low` to `high` lie inside.
    const int64_t low = w < 0 ? -w : 0, high = x_.w - w < step_ ? x_.w - w : step_;
    for (int i = 0; i < kTile; ++i) {
      column[i] = Vector{};
      for (int r = 0; r < rows_ && low < high; ++r) {
        const int64_t h = h0_ + i * step_ + r;
        if (h < 0 || h >= x_.h) continue;
        const T* from = data + (i * step_ + r) * row_stride;
        if (plain_) {
          column[i] = load_range(column[i], from - r * run_, r * run_ + low * x_.c, r * run_ + high * x_.c);
        } else {
          read_pixels(from, low, high, r * run_, column[i]);
        }
      }
    }
  }

 private:
  void read_pixels(const T* from, int64_t low, int64_t high, int lane, Vector& to) const {
    for (int64_t pixel = low; pixel < high; ++pixel) {
      for (int64_t c = 0; c < x_.c; ++c) {
        float value = load_one(from + pixel * x_.pixel_stride + c);
        if (problem_.input_scale != nullptr) value *= problem_.input_scale[c];
        if (problem_.input_shift != nullptr) value += problem_.input_shift[c];
        if (problem_.input_relu) value = relu(value);
        to[lane + pixel * x_.c + c] = value;
      }
    }
  }

  const WinogradProblem& problem_;
  const TensorView& x_;
  int64_t step_, h0_, w0_, image_;
  int rows_, run_;
  bool plain_, inside_;
};

// B^T x B of the tile that `reader` reads: put(i, j, values) takes point (i, j)'s.
template <int kTile, typename Reader, typename Put>
static inline __attribute__((always_inline)) void transform_phase(const Reader& reader, Put put) {
  Vector half[kTile][kTile];
  for (int j = 0; j < kTile; ++j) {
    Vector column[kTile], down[kTile];
    reader.read_column(j, column);
    input_transform<kTile>(column, down);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) half[i][j] = down[i];
  }
  for (int i = 0; i < kTile; ++i) {
    Vector across[kTile];
    input_transform<kTile>(half[i], across);
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) put(i, j, across[j]);
  }
}

template <typename Products, int kTile, typename T>
static void transform_block_of(const WinogradProblem& problem, const TileBlock& tiles, TileOrder order, float* to) {
  const int64_t vector_stride = tiles.count * kVectorWidth, point_stride = input_point_stride(problem);
  const int stride = problem.stride;
  TilePlace place = place_of(problem, tiles.first);
  for (int64_t i = 0; i < tiles.count; ++i, place = place_after(problem, place)) {
    float* first = to + order.take(place) * kVectorWidth;  // of the first point
    if (problem.rows_per_vector > 0) {
      for (int row = 0; row < stride; row += problem.rows_per_vector, first += vector_stride) {
        transform_phase<kTile>(RowReader<T, kTile>(problem, place, row),
                               [&](int i, int j, Vector value) __attribute__((always_inline)) {
                                 store(first + (i * kTile + j) * point_stride, value);
                               });
      }
      continue;
    }
    for (int phase = 0; phase < stride * stride; ++phase) {
      for (int64_t c = 0; c < problem.input.c; c += Products::kVectorChannels, first += vector_stride) {
        Products::template transform<T, kTile>(problem, place, {phase / stride, phase % stride}, c, point_stride,
                                               first);
      }
    }
  }
}

template <typename Products, int kTile>
static void transform_block(const WinogradProblem& problem, const TileBlock& tiles, const TileOrder& order, float* to) {
  if (problem.input.dtype == DType::f32) {
    transform_block_of<Products, kTile, float>(problem, tiles, order, to);
  } else {
    transform_block_of<Products, kTile, uint16_t>(problem, tiles, order, to);
  }
}

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
