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
// Work: a task owns `tile_rows` pixels x `blocks_per_task` column blocks. A 1x1 filter with stride 1 reads the input in
// place: its pixels lie one pixel stride apart. Everything else is first gathered, bf16 as it is, into a panel
// [pixel][panel_stride], in chunks of at most kBf16MaxChunk reduction values; border zeros, strides, dilation and the
// prologue are dealt with there, once per value. Then, for every column block and every micro-tile of up to 14 pixels:
// broadcast a pair of each pixel and multiply it with two vectors of weights.
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

constexpr int kRows = kBf16MicroRows;
constexpr int64_t kBlock = kBf16ColumnBlock;
constexpr int64_t kLanes = 32;  // bf16 values in a vector
static_assert(kVectorWidth == 16, "written for vectors of 512 bits");

struct Pixel {
  int64_t input_row;  // first pixel of image n in the input, in pixels
  int64_t ih, iw;     // input position of filter tap (0, 0); may lie outside
};

static inline int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

static inline __mmask32 first_halves(int64_t count) {
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
                                int64_t end, bool has_prologue, uint16_t* panel) {
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
        } else if (has_prologue) {
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
  const bool has_prologue = problem.input_scale != nullptr || problem.input_shift != nullptr || problem.input_relu;
  const bool adjacent = g.groups == 1 && problem.input.pixel_stride == problem.input.c && g.dilation_w == 1 &&
                        g.filter_w > 1 && !has_prologue;
  for (int64_t i = 0; i < rows; ++i, panel += problem.panel_stride) {
    if (adjacent) {
      gather_pixel<true>(problem, pixels[i], channel0, begin, end, false, panel);
    } else {
      gather_pixel<false>(problem, pixels[i], channel0, begin, end, has_prologue, panel);
    }
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

// y of one row of sums.
template <int Vectors>
static inline void finish_row(const MicroTarget& target, const Vector* scale, const Vector* bias, int row,
                              const Vector* sum) {
  const Conv2dBf16Problem& problem = *target.problem;
  Vector value[2] = {};
  for (int j = 0; j < Vectors; ++j) value[j] = sum[j] * scale[j] + bias[j];
  if (problem.residual) {
    Vector low, high;
    widen(static_cast<const uint16_t*>(problem.residual.data) + (target.pixel + row) * problem.residual.pixel_stride +
              target.channel,
          target.columns, low, high);
    value[0] += low;
    if (Vectors > 1) value[1] += high;
  }
  if (problem.relu) {
    for (int j = 0; j < Vectors; ++j) value[j] = relu(value[j]);
  }
  uint16_t* out = static_cast<uint16_t*>(problem.out.data) + (target.pixel + row) * problem.out.pixel_stride +
                  target.channel;
  const __m512i halves = narrow(value[0], value[1]);
  if (target.columns == kBlock) {
    _mm512_storeu_si512(out, halves);
  } else {
    _mm512_mask_storeu_epi16(out, first_halves(target.columns), halves);
  }
}

// One pair of `Rows` pixels, `stride` bytes apart from `x[0]` on; x[1] and x[2] are 5 and 10 pixels on, so that every
// pixel's address is one operand of a load.
template <int Rows, int Vectors>
static inline __attribute__((always_inline)) void add_pair(const char* const* x, int64_t stride, int64_t stride3,
                                                           const uint16_t* weight, __m512 (*sum)[Vectors]) {
  __m512bh w[Vectors];
#pragma GCC unroll 2
  for (int j = 0; j < Vectors; ++j) w[j] = (__m512bh)_mm512_loadu_si512(weight + j * kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    const char* from = x[i / 5] + (i % 5 == 3 ? stride3 : i % 5 * stride);
    int32_t pair;
    __builtin_memcpy(&pair, from, 4);
    const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], value, w[j]);
  }
}

template <int Rows, int Vectors>
static void micro_kernel(const uint16_t* input, int64_t pixel_stride, const uint16_t* weight, int64_t pairs,
                         const MicroTarget& target) {
  __m512 sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  int64_t stride = 2 * pixel_stride, stride3 = 3 * stride;
  const char* x[3];
  x[0] = reinterpret_cast<const char*>(input);
  x[1] = Rows > 5 ? x[0] + 5 * stride : x[0];
  x[2] = Rows > 10 ? x[0] + 10 * stride : x[0];
  for (; pairs > 0; --pairs) {
    // Keeps the compiler from making 14 pointers of these.
    __asm__("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(stride), "+r"(stride3));
    add_pair<Rows, Vectors>(x, stride, stride3, weight, sum);
    x[0] += 4, x[1] += 4, x[2] += 4;
    weight += 2 * kBlock;
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
  Vector scale[Vectors], bias[Vectors];
#pragma GCC unroll 2
  for (int j = 0; j < Vectors; ++j) {
    scale[j] = load(target.scale + j * kVectorWidth);
    bias[j] = load(target.bias + j * kVectorWidth);
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    Vector values[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) values[j] = (Vector)sum[i][j];
    finish_row<Vectors>(target, scale, bias, i, values);
  }
}

using MicroKernel = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, const MicroTarget&);

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

static int64_t panel_bytes(const Conv2dBf16Problem& problem) {
  return problem.in_place ? 0 : (problem.tile_rows * problem.panel_stride * 2 + 63) / 64 * 64;
}

}  // namespace

int64_t conv2d_bf16_scratch_bytes(const Conv2dBf16Problem& problem) {
  const bool one_chunk = problem.chunk >= problem.geometry.filter_h * problem.row_values;
  return panel_bytes(problem) + (one_chunk ? 0 : problem.tile_rows * problem.blocks_per_task * kBlock * 4);
}

void conv2d_bf16_task(const Conv2dBf16Problem& problem, int64_t index, void* memory) {
  const int64_t pixels_total = problem.out.pixels();
  const int64_t column_tasks = (problem.column_blocks + problem.blocks_per_task - 1) / problem.blocks_per_task;
  const int64_t row_tasks = (pixels_total + problem.tile_rows - 1) / problem.tile_rows;
  // Column tasks vary slowest, so that threads that run side by side share weights.
  const int64_t row_task = index % row_tasks;
  const int64_t column_task = index / row_tasks % column_tasks;
  const int64_t group = index / row_tasks / column_tasks;

  const int64_t first_pixel = row_task * problem.tile_rows;
  const int64_t rows = pixels_total - first_pixel < problem.tile_rows ? pixels_total - first_pixel : problem.tile_rows;
  const int64_t first_block = column_task * problem.blocks_per_task;
  const int64_t last_block = first_block + problem.blocks_per_task < problem.column_blocks
                                 ? first_block + problem.blocks_per_task
                                 : problem.column_blocks;
  const int64_t reduction = problem.geometry.filter_h * problem.row_values;
  const int64_t channel0 = group * problem.group_in;
  const int64_t micro_tiles = (rows + kRows - 1) / kRows;  // of nearly equal height

  uint16_t* panel = static_cast<uint16_t*>(memory);
  MicroTarget target;
  target.problem = &problem;
  target.partial_stride = problem.blocks_per_task * kBlock;
  float* partial = reinterpret_cast<float*>(static_cast<char*>(memory) + panel_bytes(problem));

  Pixel pixels[kBf16MaxTileRows];
  const uint16_t* input = panel;
  int64_t input_stride = problem.panel_stride;
  if (problem.in_place) {
    input_stride = problem.input.pixel_stride;
    input = static_cast<const uint16_t*>(problem.input.data) + first_pixel * input_stride + channel0;
  } else {
    locate_pixels(problem, first_pixel, rows, pixels);
  }

  for (int64_t begin = 0; begin < reduction; begin += problem.chunk) {
    const int64_t end = begin + problem.chunk < reduction ? begin + problem.chunk : reduction;
    if (!problem.in_place) gather_panel(problem, pixels, rows, channel0, begin, end, panel);
    target.load_partial = begin > 0;
    target.finish = end == reduction;
    for (int64_t block = first_block; block < last_block; ++block) {
      const uint16_t* weight =
          problem.packed_weight + ((group * problem.column_blocks + block) * reduction + begin) * kBlock;
      const int64_t columns_left = problem.group_out - block * kBlock;
      target.columns = columns_left < kBlock ? columns_left : kBlock;
      target.channel = group * problem.group_out + block * kBlock;
      target.scale = problem.scale + (group * problem.column_blocks + block) * kBlock;
      target.bias = problem.bias + (group * problem.column_blocks + block) * kBlock;
      const MicroKernel* kernels = target.columns <= kVectorWidth ? kOneVector.by_rows : kTwoVectors.by_rows;
      int64_t row = 0;
      for (int64_t tile = 0; tile < micro_tiles; ++tile) {
        const int64_t height = (rows - row + micro_tiles - tile - 1) / (micro_tiles - tile);
        target.partial = partial + row * target.partial_stride + (block - first_block) * kBlock;
        target.pixel = first_pixel + row;
        kernels[height](input + row * input_stride, input_stride, weight, (end - begin) / 2, target);
        row += height;
      }
    }
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
