// Convolution on the CPU: implicit matrix product over output pixels.
//
//   y[p, k] = act(scale[k] * sum_{r,s,c} pro(x[p; r, s, c]) * w[k; r, s, c] + bias[k] + residual[p, k])
//
// Shapes: p runs over the N*P*Q output pixels of a channels-last output, (r, s, c) over the filter, flattened to one
// reduction index. Weights are packed as [group][column block][reduction][kColumnBlock], so the inner loop reads them
// as one stream.
//
// Work: a task owns `tile_rows` pixels x `blocks_per_task` column blocks. It goes over the reduction in chunks of at
// most kMaxChunk values; for each chunk it gathers the input of its pixels into a panel [pixel][kPanelStride] (border
// zeros, strides, dilation, the prologue and bf16 are all dealt with there, once per value), then runs the micro-kernel
// for every micro-tile of kMicroRows pixels x kColumnBlock channels. The panel's stride is a compile-time constant, so
// every panel address in the inner loop is one register plus an immediate.
//
// Kept in registers: the micro-tile's accumulators, two weight vectors, one broadcast. In L1: the micro-tile's panel
// rows (kMicroRows x 384 floats = 21 KiB for AVX-512). In L2: the task's panel and a run of weight blocks. Partial sums
// between chunks stay in a scratch array that only this task uses.
//
// Floor: 2*N*P*Q*K*R*S*C/groups FLOPs at the FMA rate; each weight is read once per `tile_rows` pixels.

#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int64_t kMaxChunk = kConv2dMaxChunk;
constexpr int64_t kPanelStride = kMaxChunk + 16;  // not a multiple of 1 KiB: rows spread over the cache's sets
constexpr int64_t kMaxRowsPerTask = 8 * kMicroRows;

struct Pixel {
  int64_t input_row;  // first pixel of image n in the input, in pixels
  int64_t ih, iw;     // input position of filter tap (0, 0); may lie outside
  int64_t out;        // output pixel index
};

// ---- gather -------------------------------------------------------------------------------------------------------

// Runs shorter than a vector go value by value; the end of a longer one is covered by a vector that overlaps its
// neighbour.
static inline void zero_fill(float* to, int64_t count) {
  if (count < kVectorWidth) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0.0f;
    return;
  }
  for (int64_t i = 0; i + kVectorWidth < count; i += kVectorWidth) store(to + i, Vector{});
  store(to + count - kVectorWidth, Vector{});
}

template <typename T>
static inline void copy_run(float* to, const T* from, int64_t count) {
  if (count < kVectorWidth) {
    for (int64_t i = 0; i < count; ++i) to[i] = load_one(from + i);
    return;
  }
  for (int64_t i = 0; i + kVectorWidth < count; i += kVectorWidth) store(to + i, load(from + i));
  store(to + count - kVectorWidth, load(from + count - kVectorWidth));
}

// The prologue of channels [c, ...), one vector of them at a time.
struct ChannelPrologue {
  const float* scale;
  const float* shift;
  bool has_relu;

  Vector operator()(Vector x, int64_t i, int64_t lanes) const {
    if (scale != nullptr) x *= lanes < kVectorWidth ? load_some(scale + i, lanes) : load(scale + i);
    if (shift != nullptr) x += lanes < kVectorWidth ? load_some(shift + i, lanes) : load(shift + i);
    return has_relu ? relu(x) : x;
  }
};

// copy_run with the prologue applied on the way.
template <typename T>
static inline void copy_run(float* to, const T* from, int64_t count, const ChannelPrologue& prologue) {
  if (count < kVectorWidth) {
    store_some(to, prologue(load_some(from, count), 0, count), count);
    return;
  }
  for (int64_t i = 0; i + kVectorWidth < count; i += kVectorWidth) {
    store(to + i, prologue(load(from + i), i, kVectorWidth));
  }
  const int64_t last = count - kVectorWidth;
  store(to + last, prologue(load(from + last), last, kVectorWidth));
}

// Reduction values [begin, end) of all pixels, tap by tap: each tap is a run of adjacent channels.
template <typename T>
static void gather_taps(const Conv2dProblem& problem, const Pixel* pixels, int64_t rows, int64_t channel0,
                        int64_t begin, int64_t end, bool has_prologue, float* panel) {
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& x = problem.input;
  const T* data = static_cast<const T*>(x.data);
  const int64_t channels = problem.group_in;
  int64_t tap = begin / channels, c = begin % channels;
  while (begin < end) {
    const int64_t count = channels - c < end - begin ? channels - c : end - begin;
    const ChannelPrologue prologue = {problem.input_scale ? problem.input_scale + channel0 + c : nullptr,
                                      problem.input_shift ? problem.input_shift + channel0 + c : nullptr,
                                      problem.input_relu};
    const int64_t dh = tap / g.filter_w * g.dilation_h, dw = tap % g.filter_w * g.dilation_w;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t h = pixels[i].ih + dh, w = pixels[i].iw + dw;
      float* to = panel + i * kPanelStride;
      if (h >= 0 && h < x.h && w >= 0 && w < x.w) {
        const T* from = data + (pixels[i].input_row + h * x.w + w) * x.pixel_stride + channel0 + c;
        if (has_prologue) {
          copy_run(to, from, count, prologue);
        } else {
          copy_run(to, from, count);
        }
      } else {
        zero_fill(to, count);
      }
    }
    panel += count;
    begin += count;
    c = 0;
    ++tap;
  }
}

// The same where a filter row's taps are adjacent in memory (no dilation, pixels without gaps): one run per filter row.
// This is the few-channel stem's path.
template <typename T>
static void gather_rows(const Conv2dProblem& problem, const Pixel& pixel, int64_t begin, int64_t end, float* to) {
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& x = problem.input;
  const T* data = static_cast<const T*>(x.data);
  const int64_t channels = x.c;
  const int64_t row_length = g.filter_w * channels;
  // Taps [first, last) of a row lie inside the image.
  int64_t first = -pixel.iw, last = x.w - pixel.iw;
  first = first < 0 ? 0 : (first > g.filter_w ? g.filter_w : first);
  last = last < first ? first : (last > g.filter_w ? g.filter_w : last);
  int64_t r = begin / row_length, j = begin % row_length;
  while (begin < end) {
    const int64_t count = row_length - j < end - begin ? row_length - j : end - begin;
    const int64_t h = pixel.ih + r * g.dilation_h;
    int64_t lo = first * channels, hi = last * channels;
    if (h < 0 || h >= x.h) lo = hi = 0;
    lo = lo < j ? j : (lo > j + count ? j + count : lo);
    hi = hi < lo ? lo : (hi > j + count ? j + count : hi);
    zero_fill(to, lo - j);
    if (hi > lo) copy_run(to + (lo - j), data + (pixel.input_row + h * x.w + pixel.iw) * channels + lo, hi - lo);
    zero_fill(to + (hi - j), j + count - hi);
    to += count;
    begin += count;
    j = 0;
    ++r;
  }
}

template <typename T>
static void gather_panel(const Conv2dProblem& problem, const Pixel* pixels, int64_t rows, int64_t channel0,
                         int64_t begin, int64_t end, float* panel) {
  const Conv2dGeometry& g = problem.geometry;
  const bool has_prologue = problem.input_scale != nullptr || problem.input_shift != nullptr || problem.input_relu;
  const bool adjacent_taps = problem.geometry.groups == 1 && problem.input.pixel_stride == problem.input.c &&
                             g.dilation_w == 1 && g.filter_w > 1 && !has_prologue;
  if (!adjacent_taps) {
    gather_taps<T>(problem, pixels, rows, channel0, begin, end, has_prologue, panel);
    return;
  }
  for (int64_t i = 0; i < rows; ++i) gather_rows<T>(problem, pixels[i], begin, end, panel + i * kPanelStride);
}

// ---- micro-kernel ---------------------------------------------------------------------------------------------------

// Where a micro-tile's sums come from and go to.
struct MicroTarget {
  float* partial;  // [row][partial_stride] sums of earlier chunks, or to be left for later ones
  int64_t partial_stride;
  bool load_partial, finish;
  const Conv2dProblem* problem;
  const Pixel* pixels;
  int64_t channel;     // first output channel (over all groups)
  int64_t columns;     // valid output channels, <= kColumnBlock
  const float* scale;  // at this block
  const float* bias;
  // Weights of the block that follows, fetched into L2 meanwhile: each step of the reduction touches one address.
  const char* ahead;
  int64_t ahead_step;
};

// One row's epilogue for any storage type and any number of valid channels.
template <typename T>
static void finish_row(const MicroTarget& target, int row, const float* sums) {
  const Conv2dProblem& problem = *target.problem;
  const int64_t pixel = target.pixels[row].out;
  T* out = static_cast<T*>(problem.out.data) + pixel * problem.out.pixel_stride + target.channel;
  const T* residual = problem.residual ? static_cast<const T*>(problem.residual.data) +
                                             pixel * problem.residual.pixel_stride + target.channel
                                       : nullptr;
  for (int64_t k = 0; k < target.columns; k += kVectorWidth) {
    const int64_t lanes = target.columns - k;
    Vector value = load(sums + k) * load(target.scale + k) + load(target.bias + k);
    if (residual != nullptr) value += lanes < kVectorWidth ? load_some(residual + k, lanes) : load(residual + k);
    if (problem.relu) value = relu(value);
    if (lanes < kVectorWidth) {
      store_some(out + k, value, lanes);
    } else {
      store(out + k, value);
    }
  }
}

// Sums that do not fill whole fp32 vectors of the output: by way of memory, row by row.
template <int Rows, int Vectors>
static __attribute__((noinline)) void finish_rows(const MicroTarget& target, const float* sums) {
  for (int i = 0; i < Rows; ++i) {
    if (target.problem->out.dtype == DType::f32) {
      finish_row<float>(target, i, sums + i * Vectors * kVectorWidth);
    } else {
      finish_row<uint16_t>(target, i, sums + i * Vectors * kVectorWidth);
    }
  }
}

// What the epilogue reads and writes, asked for before the sums are formed.
template <int Rows>
static inline void prefetch_epilogue(const MicroTarget& target) {
  const TensorView& out = target.problem->out;
  const TensorView& residual = target.problem->residual;
  const int64_t item = size_in_bytes(out.dtype), last = (target.columns - 1) * item;
  for (int i = 0; i < Rows; ++i) {
    const int64_t pixel = target.pixels[i].out;
    const char* to = static_cast<const char*>(out.data) + (pixel * out.pixel_stride + target.channel) * item;
    __builtin_prefetch(to, 1, 3);
    __builtin_prefetch(to + last, 1, 3);
    if (residual) {
      const char* from =
          static_cast<const char*>(residual.data) + (pixel * residual.pixel_stride + target.channel) * item;
      __builtin_prefetch(from, 0, 3);
      __builtin_prefetch(from + last, 0, 3);
    }
  }
}

// Rows lie `stride` floats apart, kPanelStride in a panel. To keep the inner loop to few registers, every third row has
// a pointer of its own.
template <int Rows, int Vectors, bool InPanel>
static void micro_kernel(const float* panel, int64_t stride, const float* weight, int64_t depth,
                         const MicroTarget& target) {
  if (InPanel) stride = kPanelStride;
  const float* third[(Rows + 2) / 3];
#pragma GCC unroll 8
  for (int i = 0; i < (Rows + 2) / 3; ++i) third[i] = panel + 3 * i * stride;
  Vector sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sum[i][j] = Vector{};
  }
  if (target.finish) prefetch_epilogue<Rows>(target);
  const char* ahead = target.ahead;
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(ahead, 0, 2);
    ahead += target.ahead_step;
    Vector w[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) w[j] = load(weight + k * kColumnBlock + j * kVectorWidth);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vector x = broadcast(InPanel ? panel[i * kPanelStride + k] : third[i / 3][i % 3 * stride]);
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sum[i][j] += x * w[j];
    }
    if (!InPanel) {
#pragma GCC unroll 8
      for (int i = 0; i < (Rows + 2) / 3; ++i) ++third[i];
    }
  }
  // A chunk is summed by itself and then added to the earlier ones: rounding grows with a chunk's length, not the
  // filter's.
  if (target.load_partial) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) {
        sum[i][j] += load(target.partial + i * target.partial_stride + j * kVectorWidth);
      }
    }
  }
  if (!target.finish) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) store(target.partial + i * target.partial_stride + j * kVectorWidth, sum[i][j]);
    }
    return;
  }
  const Conv2dProblem& problem = *target.problem;
  if (problem.out.dtype != DType::f32 || target.columns != Vectors * kVectorWidth) {
    alignas(64) float sums[Rows * Vectors * kVectorWidth];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) store(sums + (i * Vectors + j) * kVectorWidth, sum[i][j]);
    }
    finish_rows<Rows, Vectors>(target, sums);
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
    const int64_t pixel = target.pixels[i].out;
    float* out = static_cast<float*>(problem.out.data) + pixel * problem.out.pixel_stride + target.channel;
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      Vector value = sum[i][j] * scale[j] + bias[j];
      if (problem.residual) {
        value += load(static_cast<const float*>(problem.residual.data) + pixel * problem.residual.pixel_stride +
                      target.channel + j * kVectorWidth);
      }
      if (problem.relu) value = relu(value);
      store(out + j * kVectorWidth, value);
    }
  }
}

using MicroKernel = void (*)(const float*, int64_t, const float*, int64_t, const MicroTarget&);

template <int Vectors, bool InPanel>
struct MicroKernels {
  MicroKernel by_rows[kMicroRows + 1] = {};
  constexpr MicroKernels() { fill<kMicroRows>(); }
  template <int Rows>
  constexpr void fill() {
    by_rows[Rows] = micro_kernel<Rows, Vectors, InPanel>;
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
};

constexpr MicroKernels<1, true> kOneVector;
constexpr MicroKernels<2, true> kTwoVectors;
constexpr MicroKernels<1, false> kOneVectorInPlace;
constexpr MicroKernels<2, false> kTwoVectorsInPlace;

// ---- tasks
// ------------------------------------------------------------------------------------------------------------

struct Scratch {
  float* panel;    // [tile_rows][kPanelStride]
  float* partial;  // [tile_rows][blocks_per_task * kColumnBlock]
};

static int64_t panel_bytes(const Conv2dProblem& problem) {
  return problem.tile_rows * kPanelStride * 4;
}

static int64_t scratch_bytes(const Conv2dProblem& problem) {
  return panel_bytes(problem) + problem.tile_rows * problem.blocks_per_task * kColumnBlock * 4;
}

static void locate_pixels(const Conv2dProblem& problem, int64_t first, int64_t count, Pixel* pixels) {
  const Conv2dGeometry& g = problem.geometry;
  const int64_t out_h = problem.out.h, out_w = problem.out.w;
  int64_t q = first % out_w, p = first / out_w % out_h, n = first / out_w / out_h;
  for (int64_t i = 0; i < count; ++i) {
    pixels[i] = {n * problem.input.h * problem.input.w, p * g.stride_h - g.pad_top, q * g.stride_w - g.pad_left,
                 first + i};
    if (++q == out_w) {
      q = 0;
      if (++p == out_h) {
        p = 0;
        ++n;
      }
    }
  }
}

static void run_task(const Conv2dProblem& problem, int64_t index, void* memory) {
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
  const int64_t reduction = problem.geometry.filter_h * problem.geometry.filter_w * problem.group_in;
  const int64_t group_weights = problem.column_blocks * reduction * kColumnBlock;
  const int64_t partial_stride = problem.blocks_per_task * kColumnBlock;

  float* panel = static_cast<float*>(memory);
  float* partial = panel + problem.tile_rows * kPanelStride;
  Pixel pixels[kMaxRowsPerTask];
  locate_pixels(problem, first_pixel, rows, pixels);

  // Micro-tiles of nearly equal height: 49 pixels are 13 + 12 + 12 + 12, not 14 + 14 + 14 + 7.
  const int64_t micro_tiles = (rows + kMicroRows - 1) / kMicroRows;

  const float* first_weight = problem.packed_weight + group * group_weights + first_block * reduction * kColumnBlock;
  // Where this task's weights end, another's begin, or those of all: prefetching beyond is harmless.
  const int64_t following = row_task + 1 < row_tasks ? 0 : (last_block - first_block) * reduction * kColumnBlock;

  for (int64_t begin = 0; begin < reduction; begin += problem.chunk) {
    const int64_t end = begin + problem.chunk < reduction ? begin + problem.chunk : reduction;
    const float* from = panel;
    int64_t stride = kPanelStride;
    if (problem.in_place) {
      stride = problem.input.pixel_stride;
      from = static_cast<const float*>(problem.input.data) + first_pixel * stride + group * problem.group_in + begin;
    } else if (problem.input.dtype == DType::f32) {
      gather_panel<float>(problem, pixels, rows, group * problem.group_in, begin, end, panel);
    } else {
      gather_panel<uint16_t>(problem, pixels, rows, group * problem.group_in, begin, end, panel);
    }
    MicroTarget target;
    target.problem = &problem;
    target.partial_stride = partial_stride;
    target.load_partial = begin > 0;
    target.finish = end == reduction;
    if (problem.prefetch_input) {
      // The pixels of the next task, spread over this one's steps; nothing where they are not adjacent in memory.
      const int64_t steps = (last_block - first_block) * micro_tiles * (end - begin);
      const int64_t item = size_in_bytes(problem.input.dtype);
      target.ahead = static_cast<const char*>(problem.input.data) +
                     ((first_pixel + rows) * problem.input.pixel_stride + begin) * item;
      target.ahead_step = rows * problem.input.pixel_stride * item / steps;
    }
    for (int64_t block = first_block; block < last_block; ++block) {
      const float* weight = problem.packed_weight + group * group_weights + (block * reduction + begin) * kColumnBlock;
      const int64_t columns_left = problem.group_out - block * kColumnBlock;
      target.columns = columns_left < kColumnBlock ? columns_left : kColumnBlock;
      target.channel = group * problem.group_out + block * kColumnBlock;
      target.scale = problem.scale + (group * problem.column_blocks + block) * kColumnBlock;
      target.bias = problem.bias + (group * problem.column_blocks + block) * kColumnBlock;
      if (!problem.prefetch_input) {
        const float* next = block + 1 < last_block ? weight + reduction * kColumnBlock
                            : end < reduction      ? first_weight + end * kColumnBlock
                                                   : first_weight + following;
        target.ahead = reinterpret_cast<const char*>(next);
        target.ahead_step = kColumnBlock * 4 / micro_tiles;
      }
      const bool one_vector = target.columns <= kVectorWidth;
      const MicroKernel* in_place = one_vector ? kOneVectorInPlace.by_rows : kTwoVectorsInPlace.by_rows;
      const MicroKernel* in_panel = one_vector ? kOneVector.by_rows : kTwoVectors.by_rows;
      const MicroKernel* kernels = problem.in_place ? in_place : in_panel;
      int64_t row = 0;
      for (int64_t tile = 0; tile < micro_tiles; ++tile) {
        const int64_t height = (rows - row + micro_tiles - tile - 1) / (micro_tiles - tile);
        target.partial = partial + row * partial_stride + (block - first_block) * kColumnBlock;
        target.pixels = pixels + row;
        kernels[height](from + row * stride, stride, weight, end - begin, target);
        row += height;
        target.ahead += (end - begin) * target.ahead_step;
      }
    }
  }
}

}  // namespace

int64_t conv2d_scratch_bytes(const Conv2dProblem& problem) {
  return scratch_bytes(problem);
}

void conv2d_task(const Conv2dProblem& problem, int64_t index, void* scratch) {
  run_task(problem, index, scratch);
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
