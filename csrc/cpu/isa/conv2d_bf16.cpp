// Convolution of bf16 tensors by bf16 dot products (AVX512-BF16): implicit matrix product over output pixels.
//
//   y[p, k] = act(scale[k] * sum_{r,s,c} pro(x[p; r, s, c]) * w[k; r, s, c] + bias[k] + residual[p, k])
//
// vdpbf16ps adds the products of two adjacent bf16 values to an fp32 sum: twice the multiplications of an fp32 FMA, and
// neither operand is widened. It takes denormals as zero. pro(x) is computed in fp32 and rounded to bf16.
//
// Shapes: p runs over the N*P*Q output pixels of a channels-last output. The reduction runs over filter rows r and, in
// a row, over its S*C/groups values (s, c), with one zero behind them where that number is odd; two adjacent values
// make a pair. Weights: [group][column block][pair][32 channels][2].
//
// Work: a task owns some pixels x `blocks_per_task` column blocks. For every column block and every micro-tile of up to
// 14 pixels it broadcasts a pair of each pixel and multiplies it with two vectors of weights. Where the pairs are read:
//
//   in place  a 1x1 filter with stride 1: pixels lie one pixel stride apart in the input.
//   strip     the input rows that a few output rows need are copied, bf16 as they are, with their border zeros and the
//             prologue applied. In the strip each filter row of an output pixel is one run, and the runs of
//             neighbouring pixels lie one stride apart.
//   panel     what is left (dilation, strided 1x1, narrow outputs): each pixel's reduction values are gathered into
//             [pixel][panel_stride], in chunks of at most kBf16MaxChunk.
//
// A micro-tile's pixels are two equally spaced series of up to 7, which need not continue each other: two output rows
// of 7 pixels are one micro-tile.
//
// Kept in registers: 14 x 2 accumulators, two weight vectors, one broadcast. In L1 or L2: the micro-tile's input, read
// as 14 streams. In L2: the task's panel and a column block's weights. A broadcast is loaded into a register for both
// vectors: as an operand in memory it would be loaded twice, more than two load ports can do.
//
// Floor: 2*N*P*Q*K*R*S*C/groups FLOPs at twice the FMA rate; each weight is read once per `tile_rows` pixels.
#include "conv2d_bf16.h"

#include <immintrin.h>

#include "variant_bf16.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kRows = kBf16MicroRows, kHalfRows = kRows / 2;
constexpr int64_t kBlock = kBf16ColumnBlock;
constexpr int64_t kLanes = 32;              // bf16 values in a vector
constexpr int64_t kPairBytes = kBlock * 4;  // weights of a pair and a column block
constexpr int64_t kPrefetchDistance = 2048;
static_assert(kVectorWidth == 16, "written for vectors of 512 bits");

struct Pixel {
  int64_t input_row;  // first pixel of image n in the input, in pixels
  int64_t ih, iw;     // input position of filter tap (0, 0); may lie outside
};

static inline int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

static inline __mmask32 first_halves(int64_t count) {  // up to 32
  return static_cast<__mmask32>((uint64_t{1} << count) - 1);
}

// `count` <= 32 adjacent bf16 values as two fp32 vectors, zeros behind them, and back.
static inline void widen(const uint16_t* from, int64_t count, Vector& low, Vector& high) {
  if (count >= kLanes) {
    low = load(from), high = load(from + kVectorWidth);
  } else {
    low = load_some(from, count < kVectorWidth ? count : kVectorWidth);
    high = count > kVectorWidth ? load_some(from + kVectorWidth, count - kVectorWidth) : Vector{};
  }
}
static inline __m512i narrow(Vector low, Vector high) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// ---- gather -------------------------------------------------------------------------------------------------------
// Runs are stored in whole vectors, upwards: what one writes too much the next overwrites, and behind a pixel's last
// run there is room.

static inline void zero_run(uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) _mm512_storeu_si512(to + i, _mm512_setzero_si512());
}

static inline void copy_run(uint16_t* to, const uint16_t* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
  if (i < count) _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(first_halves(count - i), from + i));
}

static inline bool has_prologue(const Conv2dBf16Problem& problem) {
  return problem.input_scale != nullptr || problem.input_shift != nullptr || problem.input_relu;
}

// 16 values of a prologue vector; lanes that do not exist read as zero.
static inline Vector vector_at(const float* values, int64_t i, int64_t count, float otherwise) {
  if (values == nullptr) return broadcast(otherwise);
  if (i + kVectorWidth <= count) return load(values + i);
  return i < count ? load_some(values + i, count - i) : Vector{};
}

// The same with the prologue of channels [c, c + count).
static inline void prologue_run(uint16_t* to, const uint16_t* from, const Conv2dBf16Problem& problem, int64_t c,
                                int64_t count) {
  const float* scale = problem.input_scale == nullptr ? nullptr : problem.input_scale + c;
  const float* shift = problem.input_shift == nullptr ? nullptr : problem.input_shift + c;
  for (int64_t i = 0; i < count; i += kLanes) {
    Vector low, high;
    widen(from + i, count - i, low, high);
    low = low * vector_at(scale, i, count, 1.0f) + vector_at(shift, i, count, 0.0f);
    high = high * vector_at(scale, i + kVectorWidth, count, 1.0f) + vector_at(shift, i + kVectorWidth, count, 0.0f);
    if (problem.input_relu) low = relu(low), high = relu(high);
    _mm512_storeu_si512(to + i, narrow(low, high));
  }
}

// Reduction values [begin, end) of one pixel. Adjacent: a filter row's taps lie side by side in memory, so that the row
// is one run.
template <bool Adjacent>
static inline void gather_pixel(const Conv2dBf16Problem& problem, const Pixel& pixel, int64_t channel0, int64_t begin,
                                int64_t end, bool prologue, uint16_t* panel) {
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& x = problem.input;
  const int64_t channels = problem.group_in, length = g.filter_w * channels;
  const uint16_t* data = static_cast<const uint16_t*>(x.data) + pixel.input_row * x.pixel_stride + channel0;
  for (int64_t r = begin / problem.row_values; r * problem.row_values < end; ++r) {
    uint16_t* row = panel + r * problem.row_values - begin;  // where value 0 of this filter row would go
    const int64_t first = clamped(begin - r * problem.row_values, 0, length);
    const int64_t last = clamped(end - r * problem.row_values, 0, length);
    const int64_t h = pixel.ih + r * g.dilation_h;
    if (h < 0 || h >= x.h) {
      zero_run(row + first, last - first);
    } else if constexpr (Adjacent) {
      // Values [inside_first, inside_last) come from the image.
      const int64_t inside_first = clamped(-pixel.iw * channels, first, last);
      const int64_t inside_last = clamped((x.w - pixel.iw) * channels, inside_first, last);
      zero_run(row + first, inside_first - first);
      copy_run(row + inside_first, data + (h * x.w + pixel.iw) * channels + inside_first, inside_last - inside_first);
      zero_run(row + inside_last, last - inside_last);
    } else {
      for (int64_t from = first; from < last;) {
        const int64_t s = from / channels, c = from - s * channels;
        const int64_t count = channels - c < last - from ? channels - c : last - from;
        const int64_t w = pixel.iw + s * g.dilation_w;
        const uint16_t* source = data + (h * x.w + w) * x.pixel_stride + c;
        if (w < 0 || w >= x.w) {
          zero_run(row + from, count);
        } else if (prologue) {
          prologue_run(row + from, source, problem, channel0 + c, count);
        } else {
          copy_run(row + from, source, count);
        }
        from += count;
      }
    }
    if (last == length && length < problem.row_values && (r + 1) * problem.row_values <= end) row[length] = 0;
  }
}

static void gather_panel(const Conv2dBf16Problem& problem, const Pixel* pixels, int64_t rows, int64_t channel0,
                         int64_t begin, int64_t end, uint16_t* panel) {
  const Conv2dGeometry& g = problem.geometry;
  const bool prologue = has_prologue(problem);
  const bool adjacent = g.groups == 1 && problem.input.pixel_stride == problem.input.c && g.dilation_w == 1 &&
                        g.filter_w > 1 && !prologue;
  for (int64_t i = 0; i < rows; ++i, panel += problem.panel_stride) {
    if (adjacent) {
      gather_pixel<true>(problem, pixels[i], channel0, begin, end, false, panel);
    } else {
      gather_pixel<false>(problem, pixels[i], channel0, begin, end, prologue, panel);
    }
  }
}

// Channels [channel0, channel0 + C/groups) of input rows [h, h + rows) of image n with their left and right padding,
// `strip_pitch` values a row.
static void fill_strip(const Conv2dBf16Problem& problem, int64_t n, int64_t h, int64_t rows, int64_t channel0,
                       uint16_t* strip) {
  const TensorView& x = problem.input;
  const int64_t channels = problem.group_in, width = problem.strip_pixels;
  const int64_t left = clamped(problem.geometry.pad_left, 0, width);
  const int64_t inside = clamped(x.w, 0, width - left);  // input pixels that are read
  const bool prologue = has_prologue(problem);
  for (int64_t i = 0; i < rows; ++i, ++h, strip += problem.strip_pitch) {
    if (h < 0 || h >= x.h) {
      zero_run(strip, width * channels);
      continue;
    }
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + (n * x.h + h) * x.w * x.pixel_stride + channel0;
    uint16_t* to = strip + left * channels;
    zero_run(strip, left * channels);
    if (!prologue && x.pixel_stride == channels) {
      copy_run(to, from, inside * channels);
    } else {
      for (int64_t w = 0; w < inside; ++w, from += x.pixel_stride) {
        if (prologue) {
          prologue_run(to + w * channels, from, problem, channel0, channels);
        } else {
          copy_run(to + w * channels, from, channels);
        }
      }
    }
    zero_run(to + inside * channels, (width - left - inside) * channels);
  }
}

// ---- micro-kernel ---------------------------------------------------------------------------------------------------

// Where a micro-tile's sums come from and go to.
struct MicroTarget {
  float* partial;  // [row][partial_stride] sums of earlier chunks, or to be left for later ones
  int64_t partial_stride;
  bool load_partial, finish;
  const Conv2dBf16Problem* problem;
  int64_t pixel;       // first output pixel
  int64_t channel;     // first output channel (over all groups)
  int64_t columns;     // valid output channels, <= 32
  const float* scale;  // at this block
  const float* bias;
};

// y of all rows of sums. Full: of all channels of a column block.
template <int Rows, int Vectors, bool Full>
static inline __attribute__((always_inline)) void finish_rows(const MicroTarget& target, const __m512 (*sum)[Vectors]) {
  const Conv2dBf16Problem& problem = *target.problem;
  Vector scale[Vectors], bias[Vectors];
#pragma GCC unroll 2
  for (int j = 0; j < Vectors; ++j) {
    scale[j] = load(target.scale + j * kVectorWidth);
    bias[j] = load(target.bias + j * kVectorWidth);
  }
  const __m512 floor = (__m512)broadcast(problem.relu ? 0.0f : -__builtin_inff());
  const __mmask32 mask = first_halves(target.columns);
  const int64_t out_stride = problem.out.pixel_stride, residual_stride = problem.residual.pixel_stride;
  uint16_t* out = static_cast<uint16_t*>(problem.out.data) + target.pixel * out_stride + target.channel;
  const uint16_t* residual = problem.residual ? static_cast<const uint16_t*>(problem.residual.data) +
                                                    target.pixel * residual_stride + target.channel
                                              : nullptr;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    Vector value[2] = {};
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) value[j] = (Vector)sum[i][j] * scale[j] + bias[j];
    if (residual != nullptr) {
      Vector low, high;
      if constexpr (Full) {
        low = load(residual), high = load(residual + kVectorWidth);
      } else {
        widen(residual, target.columns, low, high);
      }
      value[0] += low;
      if (Vectors > 1) value[1] += high;
      residual += residual_stride;
    }
    // The maximum with a NaN is its second operand: NaN passes.
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) value[j] = (Vector)_mm512_maskz_max_ps(0xffff, floor, (__m512)value[j]);
    const __m512i halves = narrow(value[0], value[1]);
    if constexpr (Full) {
      _mm512_storeu_si512(out, halves);
    } else {
      _mm512_mask_storeu_epi16(out, mask, halves);
    }
    out += out_stride;
  }
}

// What the epilogue will read and write.
template <int Rows>
static inline void prefetch_rows(const MicroTarget& target) {
  const Conv2dBf16Problem& problem = *target.problem;
  const int64_t out_step = 2 * problem.out.pixel_stride, residual_step = 2 * problem.residual.pixel_stride;
  const char* out = static_cast<const char*>(problem.out.data) + target.pixel * out_step + 2 * target.channel;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i, out += out_step) __builtin_prefetch(out, 1, 3);
  if (problem.residual) {
    const char* residual =
        static_cast<const char*>(problem.residual.data) + target.pixel * residual_step + 2 * target.channel;
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i, residual += residual_step) __builtin_prefetch(residual, 0, 3);
  }
}

// A pair of each of `Rows` pixels. Pixels lie `stride` bytes apart, 7 from x[0] and 7 from x[1] on, so that every
// pixel's address is one operand of a load. Single: only the pair's first value, the second is zero.
template <int Rows, int Vectors, bool Single>
static inline __attribute__((always_inline)) void add_pair(const char* const* x, int64_t stride, int64_t stride3,
                                                           int64_t stride5, const uint16_t* weight,
                                                           __m512 (*sum)[Vectors]) {
  __m512bh w[Vectors];
#pragma GCC unroll 2
  for (int j = 0; j < Vectors; ++j) w[j] = (__m512bh)_mm512_loadu_si512(weight + j * kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    const int at = i % kHalfRows;
    const char* from = x[i / kHalfRows] + (at == 3 ? stride3 : at == 5 ? stride5 : at == 6 ? 2 * stride3 : at * stride);
    __m512bh value;
    if constexpr (Single) {
      uint16_t half;
      __builtin_memcpy(&half, from, 2);
      value = (__m512bh)_mm512_set1_epi32(half);
    } else {
      int32_t pair;
      __builtin_memcpy(&pair, from, 4);
      value = (__m512bh)_mm512_set1_epi32(pair);
    }
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], value, w[j]);
  }
}

// Where a micro-tile's pixels are read: `runs` runs of `values` reduction values each, `pitch` bytes apart.
struct Source {
  const char* first;   // of pixel 0
  const char* second;  // of pixel 7
  int64_t stride;      // bytes from one pixel to the next
  int64_t runs, values, pitch;
  // Weights that are needed next: brought to L2 meanwhile, `prefetch_step` bytes with every pair.
  const char* prefetch;
  int64_t prefetch_step;
};

template <int Rows, int Vectors>
static void micro_kernel(const Source& source, const uint16_t* weight, const MicroTarget& target) {
  __m512 sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  if (target.finish) prefetch_rows<Rows>(target);
  const char* prefetch = source.prefetch;
  int64_t stride = source.stride, stride3 = 3 * stride, stride5 = 5 * stride;
  for (int64_t run = 0; run < source.runs; ++run) {
    const char* x[2] = {source.first + run * source.pitch, source.second + run * source.pitch};
    for (int64_t pairs = source.values / 2; pairs > 0; --pairs) {
      // Keeps the compiler from making 14 pointers of these.
      __asm__("" : "+r"(x[0]), "+r"(x[1]), "+r"(stride), "+r"(stride3), "+r"(stride5));
      add_pair<Rows, Vectors, false>(x, stride, stride3, stride5, weight, sum);
      // A prefetch is dropped where too many are under way: so each line is asked for twice.
      __builtin_prefetch(prefetch, 0, 2);
      __builtin_prefetch(prefetch + 64, 0, 2);
      prefetch += source.prefetch_step;
      x[0] += 4, x[1] += 4;
      weight += 2 * kBlock;
    }
    if (source.values % 2 != 0) {
      add_pair<Rows, Vectors, true>(x, stride, stride3, stride5, weight, sum);
      weight += 2 * kBlock;
    }
  }
  // A chunk is summed by itself and then added to the earlier ones.
  if (target.load_partial) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) {
        sum[i][j] += (__m512)load(target.partial + i * target.partial_stride + j * kVectorWidth);
      }
    }
  }
  if (!target.finish) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) {
        store(target.partial + i * target.partial_stride + j * kVectorWidth, (Vector)sum[i][j]);
      }
    }
    return;
  }
  if (Vectors > 1 && target.columns == kBlock) {
    finish_rows<Rows, Vectors, Vectors == 2>(target, sum);
  } else {
    finish_rows<Rows, Vectors, false>(target, sum);
  }
}

using MicroKernel = void (*)(const Source&, const uint16_t*, const MicroTarget&);

template <int Vectors>
struct MicroKernels {
  MicroKernel by_rows[kRows + 1] = {};
  constexpr MicroKernels() { fill<kRows>(); }
  template <int Rows>
  constexpr void fill() {
    by_rows[Rows] = micro_kernel<Rows, Vectors>;
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
};

constexpr MicroKernels<1> kOneVector;
constexpr MicroKernels<2> kTwoVectors;

static void locate_pixels(const Conv2dBf16Problem& problem, int64_t first, int64_t count, Pixel* pixels) {
  const Conv2dGeometry& g = problem.geometry;
  const int64_t out_h = problem.out.h, out_w = problem.out.w;
  int64_t q = first % out_w, p = first / out_w % out_h, n = first / out_w / out_h;
  for (int64_t i = 0; i < count; ++i) {
    pixels[i] = {n * problem.input.h * problem.input.w, p * g.stride_h - g.pad_top, q * g.stride_w - g.pad_left};
    if (++q == out_w) {
      q = 0;
      if (++p == out_h) {
        p = 0;
        ++n;
      }
    }
  }
}

// Input rows that `rows` output rows of an image read.
static int64_t strip_rows(const Conv2dBf16Problem& problem, int64_t rows) {
  const Conv2dGeometry& g = problem.geometry;
  return (rows - 1) * g.stride_h + (g.filter_h - 1) * g.dilation_h + 1;
}

static int64_t input_bytes(const Conv2dBf16Problem& problem) {
  if (problem.path == Bf16Path::in_place) return 0;
  const int64_t values = problem.path == Bf16Path::strip
                             ? strip_rows(problem, problem.tile_rows) * problem.strip_pitch + kLanes
                             : problem.tile_rows * problem.panel_stride;
  return (values * 2 + 63) / 64 * 64;
}

// A micro-tile of a task.
struct Tile {
  int64_t height;
  int64_t pixel;          // first output pixel
  int64_t first, second;  // where pixels 0 and 7 are read, in values from the task's input on
};

// A task's column blocks, all its micro-tiles for each, over the reduction's values from `begin` on that `source` says.
static void multiply(const Conv2dBf16Problem& problem, int64_t group, int64_t first_block, int64_t last_block,
                     const Tile* tiles, int64_t count, const uint16_t* input, Source source, int64_t begin,
                     MicroTarget target, float* partial) {
  const int64_t reduction = problem.geometry.filter_h * problem.row_values;
  const int64_t depth_bytes = source.runs * ((source.values + 1) / 2) * kPairBytes;
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t index = group * problem.column_blocks + block;
    const uint16_t* weight = problem.packed_weight + (index * reduction + begin) * kBlock;
    const int64_t columns_left = problem.group_out - block * kBlock;
    target.columns = columns_left < kBlock ? columns_left : kBlock;
    target.channel = group * problem.group_out + block * kBlock;
    target.scale = problem.scale + index * kBlock;
    target.bias = problem.bias + index * kBlock;
    const MicroKernel* kernels = target.columns <= kVectorWidth ? kOneVector.by_rows : kTwoVectors.by_rows;
    // A task's very first micro-tile brings its own weights a little ahead. All others share out the next block's.
    const bool own = block == first_block, next = block + 1 < problem.column_blocks;
    const int64_t shares = own ? count - 1 : count;
    for (const Tile* tile = tiles; tile < tiles + count; ++tile) {
      source.prefetch = reinterpret_cast<const char*>(weight);
      source.prefetch_step = 0;
      if (own && tile == tiles) {
        source.prefetch += kPrefetchDistance;
        source.prefetch_step = kPairBytes;
      } else if (next) {
        source.prefetch += reduction * kBlock * 2 + (tile - tiles - own) * (depth_bytes / shares);
        source.prefetch_step = kPairBytes / shares;
      }
      source.first = reinterpret_cast<const char*>(input + tile->first);
      source.second = reinterpret_cast<const char*>(input + tile->second);
      target.pixel = tile->pixel;
      target.partial = partial + (tile->pixel - tiles->pixel) * target.partial_stride + (block - first_block) * kBlock;
      kernels[tile->height](source, weight, target);
    }
  }
}

// Cuts `pixels` equally spaced ones into micro-tiles of nearly equal height: 49 are 13 + 12 + 12 + 12, not 14 + 14 + 14
// + 7.
static Tile* cut_series(Tile* tile, int64_t pixels, int64_t pixel, int64_t first, int64_t stride) {
  for (int64_t left = (pixels + kRows - 1) / kRows; left > 0; --left, ++tile) {
    const int64_t height = (pixels + left - 1) / left;
    *tile = {height, pixel, first, first + (height > kHalfRows ? kHalfRows * stride : 0)};
    pixels -= height;
    pixel += height;
    first += height * stride;
  }
  return tile;
}

// Task (row_task, column blocks) of a problem whose rows come from a strip.
static void strip_task(const Conv2dBf16Problem& problem, int64_t row_task, int64_t group, int64_t first_block,
                       int64_t last_block, uint16_t* strip) {
  const Conv2dGeometry& g = problem.geometry;
  const int64_t out_h = problem.out.h, out_w = problem.out.w;
  const int64_t tasks = (out_h + problem.tile_rows - 1) / problem.tile_rows;  // of an image
  const int64_t n = row_task / tasks, p0 = row_task % tasks * problem.tile_rows;
  const int64_t rows = out_h - p0 < problem.tile_rows ? out_h - p0 : problem.tile_rows;
  fill_strip(problem, n, p0 * g.stride_h - g.pad_top, strip_rows(problem, rows), group * problem.group_in, strip);

  const int64_t stride = g.stride_w * problem.group_in, row_pitch = g.stride_h * problem.strip_pitch;
  Tile tiles[kBf16MaxTiles];
  Tile* end = tiles;
  for (int64_t p = 0; p < rows; ++p) {
    const int64_t pixel = (n * out_h + p0 + p) * out_w;
    if (out_w == kHalfRows && p + 1 < rows) {
      *end++ = {kRows, pixel, p * row_pitch, (p + 1) * row_pitch};
      ++p;
    } else {
      end = cut_series(end, out_w, pixel, p * row_pitch, stride);
    }
  }
  MicroTarget target = {};
  target.problem = &problem;
  target.finish = true;
  const Source source = {
      nullptr, nullptr, 2 * stride, g.filter_h, g.filter_w * problem.group_in, 2 * g.dilation_h * problem.strip_pitch,
      nullptr, 0};
  multiply(problem, group, first_block, last_block, tiles, end - tiles, strip, source, 0, target, nullptr);
}

// The same in place or from a panel.
static void pixels_task(const Conv2dBf16Problem& problem, int64_t row_task, int64_t group, int64_t first_block,
                        int64_t last_block, void* memory) {
  const int64_t first_pixel = row_task * problem.tile_rows;
  const int64_t left = problem.out.pixels() - first_pixel;
  const int64_t rows = left < problem.tile_rows ? left : problem.tile_rows;
  const int64_t reduction = problem.geometry.filter_h * problem.row_values, channel0 = group * problem.group_in;
  const bool in_place = problem.path == Bf16Path::in_place;
  uint16_t* panel = static_cast<uint16_t*>(memory);
  float* partial = reinterpret_cast<float*>(static_cast<char*>(memory) + input_bytes(problem));
  const uint16_t* input = panel;
  int64_t stride = problem.panel_stride;
  Pixel pixels[kBf16MaxUnits * kRows];
  if (in_place) {
    stride = problem.input.pixel_stride;
    input = static_cast<const uint16_t*>(problem.input.data) + first_pixel * stride + channel0;
  } else {
    locate_pixels(problem, first_pixel, rows, pixels);
  }
  Tile tiles[kBf16MaxTiles];
  const int64_t count = cut_series(tiles, rows, first_pixel, 0, stride) - tiles;
  MicroTarget target = {};
  target.problem = &problem;
  target.partial_stride = problem.blocks_per_task * kBlock;
  for (int64_t begin = 0; begin < reduction; begin += problem.chunk) {
    const int64_t end = begin + problem.chunk < reduction ? begin + problem.chunk : reduction;
    if (!in_place) gather_panel(problem, pixels, rows, channel0, begin, end, panel);
    target.load_partial = begin > 0;
    target.finish = end == reduction;
    const Source source = {nullptr, nullptr, 2 * stride, 1, end - begin, 0, nullptr, 0};
    multiply(problem, group, first_block, last_block, tiles, count, input, source, begin, target, partial);
  }
}

}  // namespace

int64_t conv2d_bf16_scratch_bytes(const Conv2dBf16Problem& problem) {
  const bool one_chunk = problem.chunk >= problem.geometry.filter_h * problem.row_values;
  return input_bytes(problem) + (one_chunk ? 0 : problem.tile_rows * problem.blocks_per_task * kBlock * 4);
}

void conv2d_bf16_task(const Conv2dBf16Problem& problem, int64_t index, void* memory) {
  const int64_t column_tasks = (problem.column_blocks + problem.blocks_per_task - 1) / problem.blocks_per_task;
  // Column tasks vary slowest, so that threads that run side by side share weights.
  const int64_t row_task = index % problem.row_tasks;
  const int64_t column_task = index / problem.row_tasks % column_tasks;
  const int64_t group = index / problem.row_tasks / column_tasks;
  const int64_t first_block = column_task * problem.blocks_per_task;
  const int64_t last_block = first_block + problem.blocks_per_task < problem.column_blocks
                                 ? first_block + problem.blocks_per_task
                                 : problem.column_blocks;
  if (problem.path == Bf16Path::strip) {
    strip_task(problem, row_task, group, first_block, last_block, static_cast<uint16_t*>(memory));
  } else {
    pixels_task(problem, row_task, group, first_block, last_block, memory);
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
