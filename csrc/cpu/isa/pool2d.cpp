// Pooling on the CPU: maximum, average, adaptive average.
//
//   max:      y[n, p, q, c] = max_{r,s} x[n, p*sh - ph + r*dh, q*sw - pw + s*dw, c], outside = -inf; NaN wins
//   average:  y[n, p, q, c] = sum_{r,s} x[n, p*sh - ph + r, q*sw - pw + s, c] / d, outside = 0
//   adaptive: y[n, p, q, c] = mean of x over rows floor(p*H/P) .. ceil((p+1)*H/P) and columns likewise
//
// x, y: channels-last with pixel strides, fp32 or bf16; arithmetic in fp32. The divisor d is given, or the size of the
// window: cut at the padded image's end where padding counts, at the image's own edges where it does not.
//
// Work: a task owns `rows_per_task` neighbouring output rows (so that the input rows their windows share stay in L2)
// and `channels_per_task` channels (fewer than all only where there are too few rows to go round, as in global
// pooling). A window is cut to the image once per output row and once per output pixel; its taps are then read without
// a test.
//
// Kept in registers: one running result per channel for a block of up to kMostVectors vectors of channels. Channel
// counts that are not whole vectors end with a vector that overlaps the one before it, or with a masked one where there
// is none. Large average windows are summed in three levels of at most 16 terms each (the third: the rest), so that
// rounding errors grow far slower than the window.
//
// Floor: one read of x, one write of y.

#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kMostVectors = kVectorWidth == 16 ? 8 : 4;  // AVX-512 has twice the registers
constexpr int kTermsPerLevel = 16;

// The taps of one window along one axis that lie in the image: first, first + step, ...
struct Span {
  int64_t first, count;
  int64_t extent;  // what the window counts for in an average
};

static Span clipped_span(int64_t origin, int64_t kernel, int64_t dilation, int64_t size) {
  int64_t skipped = 0;
  if (origin < 0) skipped = dilation == 1 ? -origin : (-origin + dilation - 1) / dilation;
  const int64_t room = size - origin;  // taps at offsets below it are inside
  int64_t end = room <= 0 ? 0 : (dilation == 1 ? room : (room + dilation - 1) / dilation);
  if (end > kernel) end = kernel;
  const int64_t count = end > skipped ? end - skipped : 0;
  return {origin + skipped * dilation, count, count};
}

struct Axis {
  PoolKind kind;
  int64_t kernel, stride, pad, pad_end, dilation;
  int64_t size, out_size;
  bool count_include_pad;

  Span span(int64_t index) const {
    if (kind == PoolKind::adaptive) {
      const int64_t first = index * size / out_size;
      const int64_t count = ((index + 1) * size + out_size - 1) / out_size - first;
      return {first, count, count};
    }
    const int64_t origin = index * stride - pad;
    Span span = clipped_span(origin, kernel, dilation, size);
    if (count_include_pad) {
      const int64_t end = origin + kernel < size + pad_end ? origin + kernel : size + pad_end;
      span.extent = end - origin;
    }
    return span;
  }
};

// A window cut to the image: `rows` x `columns` taps from `first` on.
template <typename T>
struct Window {
  const T* first;  // channel 0 of the first tap
  int64_t rows, columns;
  int64_t row_stride, column_stride;  // elements from tap to tap
  float divisor;
  float scale;  // 1 / divisor where that is exact (a power of two), else 0: a division takes longer than a 2x2 window
};

// ---- blocks of channels
// ----------------------------------------------------------------------------------------------

// A block is Vectors vectors of channels, or `count` lanes of one. In memory order for fp32. bf16 comes and goes in
// whole registers of twice as many values, taken apart into even and odd channels: cheaper than widening each half.
template <int Vectors>
struct Block {
  static constexpr int vectors = Vectors;
  static constexpr int64_t channels = Vectors * kVectorWidth;

  void read(const float* p, Vector (&x)[Vectors]) const {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) x[v] = load(p + v * kVectorWidth);
  }
  void write(float* p, const Vector (&x)[Vectors]) const {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store(p + v * kVectorWidth, x[v]);
  }
  void read(const uint16_t* p, Vector (&x)[Vectors]) const {
    if constexpr (Vectors == 1) {
      x[0] = load(p);
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v += 2) load_pair(p + v * kVectorWidth, x[v], x[v + 1]);
    }
  }
  void write(uint16_t* p, const Vector (&x)[Vectors]) const {
    if constexpr (Vectors == 1) {
      store(p, x[0]);
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v += 2) store_pair(p + v * kVectorWidth, x[v], x[v + 1]);
    }
  }
};

struct PartialBlock {
  static constexpr int vectors = 1;
  int64_t count;

  template <typename T>
  void read(const T* p, Vector (&x)[1]) const {
    x[0] = load_some(p, count);
  }
  template <typename T>
  void write(T* p, const Vector (&x)[1]) const {
    store_some(p, x[0], count);
  }
};

// ---- reductions of a window over a block
// -----------------------------------------------------------------------------

template <typename T, typename B>
static inline void maximum(const Window<T>& window, const T* row, const B& block, Vector (&best)[B::vectors]) {
#pragma GCC unroll 8
  for (int v = 0; v < B::vectors; ++v) best[v] = broadcast(-__builtin_inff());
  for (int64_t r = 0; r < window.rows; ++r, row += window.row_stride) {
    const T* tap = row;
    for (int64_t s = 0; s < window.columns; ++s, tap += window.column_stride) {
      Vector x[B::vectors];
      block.read(tap, x);
#pragma GCC unroll 8
      for (int v = 0; v < B::vectors; ++v) best[v] = (x[v] > best[v]) | (x[v] != x[v]) ? x[v] : best[v];
    }
  }
}

template <typename T, typename B>
static inline void add_taps(const Window<T>& window, const T* tap, int64_t count, const B& block,
                            Vector (&sum)[B::vectors]) {
  for (int64_t s = 0; s < count; ++s, tap += window.column_stride) {
    Vector x[B::vectors];
    block.read(tap, x);
#pragma GCC unroll 8
    for (int v = 0; v < B::vectors; ++v) sum[v] += x[v];
  }
}

template <int Vectors>
static inline void move_into(Vector (&total)[Vectors], Vector (&part)[Vectors]) {
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) {
    total[v] += part[v];
    part[v] = Vector{};
  }
}

template <typename T, typename B>
static inline void average(const Window<T>& window, const T* row, const B& block, Vector (&total)[B::vectors]) {
#pragma GCC unroll 8
  for (int v = 0; v < B::vectors; ++v) total[v] = Vector{};
  if (window.rows * window.columns <= kTermsPerLevel) {
    for (int64_t r = 0; r < window.rows; ++r)
      add_taps(window, row + r * window.row_stride, window.columns, block, total);
  } else {
    Vector middle[B::vectors] = {}, part[B::vectors] = {};
    int parts = 0;
    for (int64_t r = 0; r < window.rows; ++r, row += window.row_stride) {
      for (int64_t s = 0; s < window.columns; s += kTermsPerLevel) {
        const int64_t count = window.columns - s < kTermsPerLevel ? window.columns - s : kTermsPerLevel;
        add_taps(window, row + s * window.column_stride, count, block, part);
        move_into(middle, part);
        if (++parts == kTermsPerLevel) {
          parts = 0;
          move_into(total, middle);
        }
      }
    }
    move_into(total, middle);
  }
  if (window.scale != 0.0f) {
#pragma GCC unroll 8
    for (int v = 0; v < B::vectors; ++v) total[v] *= window.scale;
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < B::vectors; ++v) total[v] /= window.divisor;
  }
}

template <bool Max, typename T, typename B>
static inline void pool_block(const Window<T>& window, int64_t channel, const B& block, T* out) {
  Vector result[B::vectors];
  if constexpr (Max) {
    maximum(window, window.first + channel, block, result);
  } else {
    average(window, window.first + channel, block, result);
  }
  block.write(out + channel, result);
}

template <bool Max, int Vectors, typename T>
static inline int64_t pool_blocks(const Window<T>& window, int64_t channel, int64_t end, T* out) {
  constexpr Block<Vectors> block;
  for (; channel + block.channels <= end; channel += block.channels) pool_block<Max>(window, channel, block, out);
  return channel;
}

// One output pixel: channels [begin, end).
template <typename T, bool Max>
static inline void pool_pixel(const Window<T>& window, int64_t begin, int64_t end, T* out) {
  int64_t c = begin;
  if constexpr (kMostVectors == 8) c = pool_blocks<Max, 8>(window, c, end, out);
  c = pool_blocks<Max, 4>(window, c, end, out);
  c = pool_blocks<Max, 2>(window, c, end, out);
  c = pool_blocks<Max, 1>(window, c, end, out);
  if (c == end) return;
  if (end - begin < kVectorWidth) {
    pool_block<Max>(window, c, PartialBlock{end - c}, out);
  } else {
    pool_block<Max>(window, end - kVectorWidth, Block<1>{}, out);  // overlaps the block before it
  }
}

// Maxima of whole 2x2 windows with stride 2, the usual pooling, of `count` neighbouring output pixels: nothing to be
// looked up for each. NaN wins as in maximum().
static inline Vector larger(Vector best, Vector x) {
  return (x > best) | (x != x) ? x : best;
}

template <typename T>
static void max_pixels_2x2(const T* from, int64_t row_stride, int64_t pixel_stride, int64_t begin, int64_t end,
                           int64_t count, T* out, int64_t out_stride) {
  for (int64_t q = 0; q < count; ++q, from += 2 * pixel_stride, out += out_stride) {
    const T *above = from, *below = from + row_stride;
    for (int64_t c = begin; c < end; c += kVectorWidth) {
      int64_t lanes = end - c;
      if (lanes < kVectorWidth && end - begin >= kVectorWidth) {
        c = end - kVectorWidth;  // overlaps the vector before it
        lanes = kVectorWidth;
      }
      if (lanes >= kVectorWidth) {
        const Vector top = larger(load(above + c), load(above + pixel_stride + c));
        store(out + c, larger(larger(top, load(below + c)), load(below + pixel_stride + c)));
      } else {
        const Vector top = larger(load_some(above + c, lanes), load_some(above + pixel_stride + c, lanes));
        const Vector value =
            larger(larger(top, load_some(below + c, lanes)), load_some(below + pixel_stride + c, lanes));
        store_some(out + c, value, lanes);
      }
    }
  }
}

template <typename T, bool Max>
static void pool_rows(const Pool2dProblem& problem, int64_t first_row, int64_t last_row, int64_t begin, int64_t end) {
  const TensorView &x = problem.input, &y = problem.out;
  const Pool2dGeometry& g = problem.geometry;
  const Axis vertical = {problem.kind,
                         g.kernel_h,
                         g.stride_h,
                         g.pad_top,
                         problem.pad_bottom,
                         g.dilation_h,
                         x.h,
                         y.h,
                         problem.count_include_pad};
  const Axis horizontal = {problem.kind,
                           g.kernel_w,
                           g.stride_w,
                           g.pad_left,
                           problem.pad_right,
                           g.dilation_w,
                           x.w,
                           y.w,
                           problem.count_include_pad};
  const T* data = static_cast<const T*>(x.data);
  const bool halves = Max && problem.kind == PoolKind::max && g.kernel_h == 2 && g.kernel_w == 2 && g.stride_w == 2 &&
                      g.pad_left == 0 && g.dilation_h == 1 && g.dilation_w == 1;
  Window<T> window;
  window.row_stride = g.dilation_h * x.w * x.pixel_stride;
  window.column_stride = g.dilation_w * x.pixel_stride;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t n = row / y.h;
    const Span rows = vertical.span(row % y.h);
    T* out = static_cast<T*>(y.data) + row * y.w * y.pixel_stride;
    int64_t q = 0;
    if (halves && rows.count == 2) {
      const int64_t whole = x.w / 2 < y.w ? x.w / 2 : y.w;
      max_pixels_2x2(data + (n * x.h + rows.first) * x.w * x.pixel_stride, window.row_stride, x.pixel_stride, begin,
                     end, whole, out, y.pixel_stride);
      q = whole;
      out += whole * y.pixel_stride;
    }
    for (; q < y.w; ++q, out += y.pixel_stride) {
      const Span columns = horizontal.span(q);
      const bool empty = rows.count == 0 || columns.count == 0;
      window.first = empty ? data : data + ((n * x.h + rows.first) * x.w + columns.first) * x.pixel_stride;
      window.rows = empty ? 0 : rows.count;
      window.columns = columns.count;
      if (!Max) {
        const int64_t divisor = problem.divisor != 0 ? problem.divisor : rows.extent * columns.extent;
        window.divisor = static_cast<float>(divisor);
        const bool power_of_two = divisor > 0 && (divisor & (divisor - 1)) == 0;
        window.scale = power_of_two ? 1.0f / window.divisor : 0.0f;
      }
      pool_pixel<T, Max>(window, begin, end, out);
    }
  }
}

}  // namespace

void pool2d_task(const Pool2dProblem& problem, int64_t index) {
  const int64_t rows = problem.out.n * problem.out.h;
  const int64_t row_tasks = (rows + problem.rows_per_task - 1) / problem.rows_per_task;
  const int64_t first = index % row_tasks * problem.rows_per_task;
  const int64_t last = rows - first < problem.rows_per_task ? rows : first + problem.rows_per_task;
  const int64_t begin = index / row_tasks * problem.channels_per_task;
  const int64_t left = problem.out.c - begin;
  const int64_t end = left < problem.channels_per_task ? problem.out.c : begin + problem.channels_per_task;
  const bool max = problem.kind == PoolKind::max;
  if (problem.input.dtype == DType::f32) {
    max ? pool_rows<float, true>(problem, first, last, begin, end)
        : pool_rows<float, false>(problem, first, last, begin, end);
  } else {
    max ? pool_rows<uint16_t, true>(problem, first, last, begin, end)
        : pool_rows<uint16_t, false>(problem, first, last, begin, end);
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
