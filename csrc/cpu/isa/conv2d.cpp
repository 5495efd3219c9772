// Convolution on the CPU: implicit matrix product over output pixels.
//
//   y[p, k] = act(scale[k] * sum_{r,s,c} pro(x[p; r, s, c]) * w[k; r, s, c] + bias[k] + residual[p, k])
//
// Shapes: p runs over the N*P*Q output pixels of a channels-last output, (r, s, c) over the filter, flattened to one
// reduction index. Weights are packed as [group][column block][reduction][kColumnBlock], so the inner loop reads them
// as one stream.
//
// Work: a task owns some output pixels x `blocks_per_task` column blocks, and runs the micro-kernel (conv2d_micro.h)
// for every micro-tile of up to kMicroRows pixels x kColumnBlock channels. Where that reads its input:
//
//   in place  a 1x1 filter with stride 1: pixels lie one pixel stride apart in the input.
//   strip     the input rows that a few output rows need are copied once, with their border zeros and the prologue
//             applied. In the strip each filter row of an output pixel is one run of S*C values, and the runs of
//             neighbouring pixels lie one stride apart.
//   panel     what is left (dilation, strided 1x1, narrow outputs): each pixel's reduction values are gathered into
//             [pixel][kPanelStride], in chunks of at most kMaxChunk.
//
// The reduction is summed in chunks of at most kMaxChunk values, each by itself: rounding grows with a chunk's length,
// not the filter's.
//
// Kept in registers: the micro-tile's accumulators, two weight vectors, one broadcast. In L1: the micro-tile's input
// (14 rows x 384 floats = 21 KiB for AVX-512, 6 rows = 9 KiB for AVX2). In L2: the task's panel or strip and a run of
// weight blocks; the weights of the block that follows, or the next task's pixels, are fetched meanwhile. Partial sums
// between chunks stay in L1, those of a panel in a scratch array that only this task uses.
//
// Floor: 2*N*P*Q*K*R*S*C/groups FLOPs at the FMA rate; each weight is read once per task that needs it.

#include "conv2d_gather.h"
#include "conv2d_micro.h"
#include "conv2d_narrow.h"
#include "conv2d_row_pairs.h"
#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kMaxMicroTiles = (kMaxTaskPixels + kMicroRows - 1) / kMicroRows;

static inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Whether tasks pass from group to group of the same rows: what they read lies side by side there, in the same pages.
static bool goes_by_groups(const Conv2dProblem& problem) {
  return problem.geometry.groups > 1 && problem.source == ConvSource::strip;
}

// What a task owns. Column tasks vary slowest, so that threads that run side by side share weights; but groups fastest
// where strips of rows are copied.
struct Task {
  int64_t row_task, row_tasks, group, first_block, last_block;

  Task(const Conv2dProblem& problem, int64_t index) : row_tasks(problem.row_tasks) {
    const int64_t column_tasks = (problem.column_blocks + problem.blocks_per_task - 1) / problem.blocks_per_task;
    const bool by_groups = goes_by_groups(problem);
    const int64_t all_columns = problem.geometry.groups * column_tasks;  // of all groups
    row_task = by_groups ? index / all_columns : index % row_tasks;
    const int64_t column_task = by_groups ? index % all_columns : index / row_tasks;
    group = column_task / column_tasks;
    first_block = column_task % column_tasks * problem.blocks_per_task;
    last_block = smaller(first_block + problem.blocks_per_task, problem.column_blocks);
  }
};

static int64_t reduction_of(const Conv2dProblem& problem) {
  return problem.geometry.filter_h * problem.geometry.filter_w * problem.group_in;
}

static const float* weights_of(const Conv2dProblem& problem, int64_t group, int64_t block) {
  return problem.packed_weight + (group * problem.column_blocks + block) * reduction_of(problem) * kColumnBlock;
}

static void aim_at_block(MicroTarget& target, int64_t group, int64_t block) {
  const Conv2dProblem& problem = *target.problem;
  target.columns = smaller(problem.group_out - block * kColumnBlock, kColumnBlock);
  target.channel = group * problem.group_out + block * kColumnBlock;
  target.scale = problem.scale + (group * problem.column_blocks + block) * kColumnBlock;
  target.bias = problem.bias + (group * problem.column_blocks + block) * kColumnBlock;
}

static const MicroKernel* kernels_for(const MicroTarget& target) {
  return target.columns <= kVectorWidth ? kOneVector.by_rows : kTwoVectors.by_rows;
}

// The next task's weights: its own first block again, or the first behind this task's.
static const float* weights_after(const Conv2dProblem& problem, const Task& task) {
  const bool again = !goes_by_groups(problem) && task.row_task + 1 < task.row_tasks;
  return weights_of(problem, task.group, again ? task.first_block : task.last_block);
}

// ---- in place, panel ----------------------------------------------------------------------------------------------

static void locate_pixels(const Conv2dProblem& problem, int64_t first, int64_t count, Pixel* pixels) {
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

// Micro-tiles of nearly equal height: 49 pixels are 13 + 12 + 12 + 12, not 14 + 14 + 14 + 7.
static int64_t micro_tile_height(int64_t rows_left, int64_t tiles_left) {
  return (rows_left + tiles_left - 1) / tiles_left;
}

// A micro-tile's chunks follow each other, so that its partial sums stay in L1.
static void run_in_place(const Conv2dProblem& problem, const Task& task) {
  const int64_t first_pixel = task.row_task * problem.tile_rows;
  const int64_t rows = smaller(problem.out.pixels() - first_pixel, problem.tile_rows);
  const int64_t micro_tiles = (rows + kMicroRows - 1) / kMicroRows;
  const int64_t reduction = reduction_of(problem), stride = problem.input.pixel_stride;
  const float* input = static_cast<const float*>(problem.input.data) + first_pixel * stride;
  alignas(64) float partial[kMicroRows * kColumnBlock];
  MicroTarget target;
  target.problem = &problem;
  target.partial = partial;
  target.partial_stride = kColumnBlock;
  MicroSource source;
  source.runs = 1;
  source.pitch = 0;
  source.stride = stride;
  if (problem.prefetch_input) {
    // The pixels of the next task, spread over this one's steps.
    const int64_t steps = (task.last_block - task.first_block) * micro_tiles * reduction;
    source.ahead = reinterpret_cast<const char*>(input + rows * stride);
    source.ahead_step = rows * stride * 4 / steps;
  }
  for (int64_t block = task.first_block; block < task.last_block; ++block) {
    const float* weight = weights_of(problem, task.group, block);
    aim_at_block(target, task.group, block);
    if (!problem.prefetch_input) {
      const float* next =
          block + 1 < task.last_block ? weight + reduction * kColumnBlock : weights_after(problem, task);
      source.ahead = reinterpret_cast<const char*>(next);
      source.ahead_step = kColumnBlock * 4 / micro_tiles;
    }
    int64_t row = 0;
    for (int64_t tile = 0; tile < micro_tiles; ++tile) {
      const int64_t height = micro_tile_height(rows - row, micro_tiles - tile);
      target.pixel = first_pixel + row;
      const float* from = input + row * stride + task.group * problem.group_in;
      for (int64_t begin = 0; begin < reduction; begin += problem.chunk) {
        source.first = from + begin;
        source.run = smaller(problem.chunk, reduction - begin);
        target.load_partial = begin > 0;
        target.finish = begin + source.run == reduction;
        kernels_for(target)[height](source, weight + begin * kColumnBlock, target);
        source.ahead += source.run * source.ahead_step;
      }
      row += height;
    }
  }
}

// Whether a filter sees all of an image, whose values then are a pixel's reduction in its order: nothing is gathered.
static bool sees_all(const Conv2dProblem& problem, int64_t rows) {
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& x = problem.input;
  const bool one_set = x.h * x.w * x.c * 4 % 4096 == 0;  // of L1, for all pixels
  return x.dtype == DType::f32 && !problem.has_prologue() && g.groups == 1 && x.pixel_stride == x.c &&
         problem.out.h * problem.out.w == 1 && g.filter_h == x.h && g.filter_w == x.w && g.pad_top == 0 &&
         g.pad_left == 0 && g.dilation_h == 1 && g.dilation_w == 1 && (!one_set || rows <= kWideRows);
}

static void run_panel(const Conv2dProblem& problem, const Task& task, float* panel) {
  const int64_t first_pixel = task.row_task * problem.tile_rows;
  const int64_t rows = smaller(problem.out.pixels() - first_pixel, problem.tile_rows);
  const int64_t micro_tiles = (rows + kMicroRows - 1) / kMicroRows;
  const int64_t reduction = reduction_of(problem);
  const int64_t partial_stride = problem.blocks_per_task * kColumnBlock;
  float* partial = panel + problem.tile_rows * kPanelStride;
  const bool whole = sees_all(problem, rows);
  Pixel pixels[kMaxMicroTiles * kMicroRows];
  if (!whole) locate_pixels(problem, first_pixel, rows, pixels);

  MicroTarget target;
  target.problem = &problem;
  target.partial_stride = partial_stride;
  for (int64_t begin = 0; begin < reduction; begin += problem.chunk) {
    const int64_t end = smaller(begin + problem.chunk, reduction);
    MicroSource source;
    source.runs = 1;
    source.run = end - begin;
    source.pitch = 0;
    source.stride = kPanelStride;
    const float* from = panel;
    if (whole) {
      source.stride = reduction;
      from = static_cast<const float*>(problem.input.data) + first_pixel * reduction + begin;
    } else if (problem.input.dtype == DType::f32) {
      gather_panel<float>(problem, pixels, rows, task.group * problem.group_in, begin, end, panel);
    } else {
      gather_panel<uint16_t>(problem, pixels, rows, task.group * problem.group_in, begin, end, panel);
    }
    target.load_partial = begin > 0;
    target.finish = end == reduction;
    if (problem.prefetch_input) {
      // The pixels of the next task, spread over this one's steps.
      const int64_t steps = (task.last_block - task.first_block) * micro_tiles * (end - begin);
      const int64_t item = size_in_bytes(problem.input.dtype);
      source.ahead = static_cast<const char*>(problem.input.data) +
                     ((first_pixel + rows) * problem.input.pixel_stride + begin) * item;
      source.ahead_step = rows * problem.input.pixel_stride * item / steps;
    }
    int64_t block = task.first_block;
    if (rows <= kWideRows) {
      // A block whose second vector holds no channel is left to the loop below.
      const auto is_wide = [&](int64_t b) { return problem.group_out - b * kColumnBlock > kVectorWidth; };
      for (; block + kWideBlocks <= task.last_block && is_wide(block + kWideBlocks - 1); block += kWideBlocks) {
        MicroTarget targets[kWideBlocks];
        for (int b = 0; b < kWideBlocks; ++b) {
          targets[b] = target;
          aim_at_block(targets[b], task.group, block + b);
          targets[b].partial = partial + (block + b - task.first_block) * kColumnBlock;
          targets[b].pixel = first_pixel;
        }
        source.first = from;
        const float* weight = weights_of(problem, task.group, block) + begin * kColumnBlock;
        (rows == 1 ? wide_micro_kernel<1> : wide_micro_kernel<2>)(source, weight, reduction * kColumnBlock, targets);
      }
    }
    for (; block < task.last_block; ++block) {
      const float* weight = weights_of(problem, task.group, block) + begin * kColumnBlock;
      aim_at_block(target, task.group, block);
      if (!problem.prefetch_input) {
        const float* next = block + 1 < task.last_block ? weight + reduction * kColumnBlock
                            : end < reduction ? weights_of(problem, task.group, task.first_block) + end * kColumnBlock
                                              : weights_after(problem, task);
        source.ahead = reinterpret_cast<const char*>(next);
        source.ahead_step = kColumnBlock * 4 / micro_tiles;
      }
      int64_t row = 0;
      for (int64_t tile = 0; tile < micro_tiles; ++tile) {
        const int64_t height = micro_tile_height(rows - row, micro_tiles - tile);
        target.partial = partial + row * partial_stride + (block - task.first_block) * kColumnBlock;
        target.pixel = first_pixel + row;
        source.first = from + row * source.stride;
        kernels_for(target)[height](source, weight, target);
        row += height;
        source.ahead += (end - begin) * source.ahead_step;
      }
    }
  }
}

// ---- strip --------------------------------------------------------------------------------------------------------

// A micro-tile of a strip, pixels of one output row: its height, its first pixel in the task, and where that lies in
// the strip.
struct StripTile {
  int64_t height, pixel, at;
};

// Of output rows [first, rows).
static int64_t cut_strip(const Conv2dProblem& problem, const StripRows& strip, int64_t first, int64_t rows,
                         StripTile* tiles) {
  const int64_t width = problem.out.w, step = problem.geometry.stride_w * problem.group_in;
  const int64_t row_step = problem.geometry.stride_h * strip.pitch;
  int64_t count = 0;
  const int64_t parts = (width + kMicroRows - 1) / kMicroRows;
  for (int64_t p = first; p < rows; ++p) {
    int64_t q = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t height = (width - q + parts - part - 1) / (parts - part);
      tiles[count++] = {height, p * width + q, p * row_step + q * step};
      q += height;
    }
  }
  return count;
}

// The tiles of one column block, each from its first filter row to the last.
static void run_strip_tiles(const Conv2dProblem& problem, const StripRows& strip, const StripTile* tiles, int64_t count,
                            int64_t first_pixel, const float* block_weight, MicroSource source, MicroTarget target) {
  const Conv2dGeometry& g = problem.geometry;
  const int64_t row_values = g.filter_w * problem.group_in;
  // A chunk is some filter rows, or a part of one.
  const int64_t rows_per_chunk = row_values < kMaxChunk ? kMaxChunk / row_values : 1;
  const int64_t parts = (row_values + kMaxChunk - 1) / kMaxChunk;
  const int64_t part = (row_values + parts - 1) / parts;
  source.stride = g.stride_w * problem.group_in;
  source.pitch = g.dilation_h * strip.pitch;
  for (int64_t at = 0; at < count; ++at) {
    const StripTile& tile = tiles[at];
    const float* weight = block_weight;
    target.pixel = first_pixel + tile.pixel;
    target.load_partial = false;
    for (int64_t r = 0; r < g.filter_h; r += rows_per_chunk) {
      source.runs = smaller(rows_per_chunk, g.filter_h - r);
      for (int64_t begin = 0; begin < row_values; begin += part) {
        source.run = smaller(part, row_values - begin);
        source.first = strip.first + tile.at + r * source.pitch + begin;
        target.finish = r + source.runs == g.filter_h && begin + source.run == row_values;
        kernels_for(target)[tile.height](source, weight, target);
        const int64_t steps = source.runs * source.run;
        weight += steps * kColumnBlock;
        source.ahead += steps * source.ahead_step;
        target.load_partial = true;
      }
    }
  }
}

static void run_strip(const Conv2dProblem& problem, const Task& task, float* scratch) {
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& x = problem.input;
  const int64_t strips = (problem.out.h + problem.tile_rows - 1) / problem.tile_rows;  // in an image
  const int64_t n = task.row_task / strips, p0 = task.row_task % strips * problem.tile_rows;
  const int64_t rows = smaller(problem.out.h - p0, problem.tile_rows);
  const int64_t h0 = problem.convolved(p0) * g.stride_h - g.pad_top, input_rows = problem.input_rows(rows);
  const bool narrow = problem.narrow_lanes != nullptr;
  const StripRows strip =
      bring_rows(problem, n, h0, input_rows, task.group * problem.group_in, narrow && has_planes(problem), scratch);
  if (narrow) {
    run_narrow(problem, n, p0, rows, strip, scratch + problem.input_rows(problem.tile_rows) * problem.strip_pitch);
    return;
  }
  alignas(64) float partial[kMicroRows * kColumnBlock];
  const int64_t reduction = reduction_of(problem), blocks = task.last_block - task.first_block;
  MicroTarget target;
  target.problem = &problem;
  target.partial = partial;
  target.partial_stride = kColumnBlock;
  for (int64_t block = task.first_block; block < task.last_block; ++block) {
    aim_at_block(target, task.group, block);
    const float* weight = weights_of(problem, task.group, block);
    const bool pairs = problem.row_pairs && target.columns <= kVectorWidth;
    const int64_t paired = pairs ? paired_rows(problem, rows) : 0;
    StripTile tiles[kMaxMicroTiles];
    const int64_t count = cut_strip(problem, strip, paired, rows, tiles);
    const int64_t pair_steps = row_pair_steps(problem, paired), steps = pair_steps + count * reduction;
    MicroSource source;
    int64_t ahead_bytes = reduction * kColumnBlock * 4;
    if (problem.prefetch_input) {
      // The input rows that the next task reads beyond these, spread over this one's steps.
      const int64_t row_bytes = x.w * x.pixel_stride * size_in_bytes(x.dtype);
      ahead_bytes = problem.convolved(rows) * g.stride_h * row_bytes / blocks;
      source.ahead = static_cast<const char*>(x.data) + (n * x.h + h0 + input_rows) * row_bytes +
                     (block - task.first_block) * ahead_bytes;
    } else {
      const float* next =
          block + 1 < task.last_block ? weights_of(problem, task.group, block + 1) : weights_after(problem, task);
      source.ahead = reinterpret_cast<const char*>(next);
    }
    source.ahead_step = (ahead_bytes + steps - 1) / steps;
    if (paired > 0) run_row_pairs(problem, n, p0, paired, strip, weight, source, target);
    source.ahead += pair_steps * source.ahead_step;
    run_strip_tiles(problem, strip, tiles, count, (n * problem.out.h + p0) * problem.out.w, weight, source, target);
  }
}

}  // namespace

int64_t conv2d_scratch_bytes(const Conv2dProblem& problem) {
  if (problem.source == ConvSource::strip) {
    const int64_t planes = problem.narrow_lanes != nullptr ? narrow_scratch_floats(problem) : 0;
    return (problem.input_rows(problem.tile_rows) * problem.strip_pitch + planes) * 4;
  }
  if (problem.source == ConvSource::in_place) return 0;
  return problem.tile_rows * (kPanelStride + problem.blocks_per_task * kColumnBlock) * 4;
}

void conv2d_task(const Conv2dProblem& problem, int64_t index, void* scratch) {
  const Task task(problem, index);
  switch (problem.source) {
    case ConvSource::in_place:
      return run_in_place(problem, task);
    case ConvSource::strip:
      return run_strip(problem, task, static_cast<float*>(scratch));
    case ConvSource::panel:
      return run_panel(problem, task, static_cast<float*>(scratch));
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
