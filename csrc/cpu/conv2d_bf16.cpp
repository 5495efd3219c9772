// Convolution in bf16 arithmetic on the CPU: weight packing and the cut into tasks. The arithmetic is in
// isa/conv2d_bf16.cpp and isa/conv2d_grouped_bf16.cpp.
#include "conv2d_bf16.h"

#include <algorithm>
#include <memory>

#include "isa/table.h"
#include "work.h"

namespace fastcnn::cpu {

void pack_bf16_pairs(const PackedConv2dWeight& shape, const uint16_t* weight, const int64_t strides[4],
                     uint16_t* packed) {
  // Where groups are spanned, a filter row's values are even in number anyway, and blocks are vectors.
  const int64_t row_values = bf16_row_values(shape.filter_w, shape.group_in);
  const int64_t reduction = shape.filter_h * row_values;
  const int64_t width = shape.spans_groups ? kernels().vector_width : kBf16ColumnBlock;
  for (int64_t k = 0; k < shape.out_channels; ++k) {
    const int64_t group = shape.spans_groups ? 0 : k / shape.group_out, column = k - group * shape.group_out;
    uint16_t* to = packed + (group * shape.column_blocks + column / width) * reduction * width + column % width * 2;
    for (int64_t r = 0; r < shape.filter_h; ++r) {
      for (int64_t s = 0; s < shape.filter_w; ++s) {
        const uint16_t* from = weight + k * strides[0] + r * strides[2] + s * strides[3];
        const int64_t first = r * row_values + s * shape.group_in;
        for (int64_t c = 0; c < shape.group_in; ++c) {
          const int64_t value = first + c;
          to[value / 2 * 2 * width + value % 2] = from[c * strides[1]];
        }
      }
    }
  }
}

namespace {

Bf16Path choose_path(const Conv2dBf16Problem& problem, bool identity) {
  const Conv2dGeometry& g = problem.geometry;
  // Pixels a multiple of 4 KiB apart would share one set of L1.
  const auto one_set = [](int64_t stride) { return stride % 2048 == 0; };
  if (g.filter_h == 1 && g.filter_w == 1) {
    const bool same_pixels = g.stride_h == 1 && g.stride_w == 1 && g.pad_top == 0 && g.pad_left == 0 &&
                             problem.out.h == problem.input.h && problem.out.w == problem.input.w;
    const bool in_place = same_pixels && identity && problem.group_in % 2 == 0 && !one_set(problem.input.pixel_stride);
    return in_place ? Bf16Path::in_place : Bf16Path::panel;
  }
  const bool fits = problem.out.w >= kBf16MicroRows / 2 && problem.out.w <= kBf16MaxTiles * kBf16MicroRows &&
                    g.dilation_w == 1 && !one_set(g.stride_w * problem.group_in);
  return fits ? Bf16Path::strip : Bf16Path::panel;
}

// How many pixels and column blocks a task owns: of some candidates the one whose last thread is done first, by an
// estimate in cycles.
int64_t cut(Conv2dBf16Problem& problem, bool identity, int threads) {
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& out = problem.out;
  const bool strip = problem.path == Bf16Path::strip;
  const int64_t reduction = g.filter_h * problem.row_values;
  const int64_t block_cycles = reduction / 2;  // per output pixel and column block
  // What it takes to bring a pixel's values, per value, and per run of them.
  const int64_t value_cycles_16 = identity ? 1 : 3, run_cycles = 8;
  // Weights too large to stay in L2 come from L3 or memory for every task, for the most part beside the arithmetic.
  constexpr int64_t kCachedWeightBytes = 192 << 10, kBytesPerCycle = 20, kTaskCycles = 500;
  constexpr int64_t kStripBytes = 384 << 10;
  const int64_t block_bytes = reduction * kBf16ColumnBlock * 2;
  const bool streams = problem.column_blocks * block_bytes > kCachedWeightBytes;
  const int64_t stream_cycles = streams ? block_bytes / kBytesPerCycle : 0;  // per column block
  const int64_t start_cycles = kTaskCycles + 2 * stream_cycles;  // of a task, whose first block nobody prefetched

  // A strip's unit of rows is an output row, else a micro-tile of pixels.
  const int64_t unit_tiles = strip ? ceil_div(out.w, kBf16MicroRows) : 1;
  const int64_t units = strip ? out.h : ceil_div(out.pixels(), kBf16MicroRows);
  int64_t best = INT64_MAX, tasks = 0;
  for (int64_t wanted = kBf16MaxUnits; wanted >= 1; wanted /= 2) {
    if (wanted > 1 && (wanted / 2 >= units || wanted * unit_tiles > kBf16MaxTiles)) continue;
    int64_t rows, row_tasks, pixels, bring_cycles;
    if (strip) {
      rows = ceil_div(out.h, ceil_div(out.h, wanted));
      row_tasks = out.n * ceil_div(out.h, rows);
      pixels = rows * out.w;
      const int64_t strip_rows = (rows - 1) * g.stride_h + (g.filter_h - 1) * g.dilation_h + 1;
      if (wanted > 1 && strip_rows * problem.strip_pitch * 2 > kStripBytes) continue;
      bring_cycles = strip_rows * (problem.strip_pitch * value_cycles_16 / 16 + run_cycles);
    } else {
      rows = pixels = ceil_div(out.pixels(), ceil_div(units, wanted));
      row_tasks = ceil_div(out.pixels(), rows);
      const bool in_place = problem.path == Bf16Path::in_place;
      bring_cycles = in_place ? 0 : pixels * (reduction * value_cycles_16 / 16 + g.filter_h * g.filter_w * run_cycles);
    }
    for (int64_t splits = 1; splits < 2 * problem.column_blocks && splits <= 32; splits *= 2) {
      const int64_t blocks = ceil_div(problem.column_blocks, splits);
      const int64_t count = row_tasks * ceil_div(problem.column_blocks, blocks) * g.groups;
      const int64_t compute = blocks * pixels * block_cycles;
      const int64_t cycles = compute + blocks * stream_cycles + bring_cycles + start_cycles;
      // A part of a task more: small ones balance better where threads do not run at one speed.
      const int64_t total = ceil_div(count, threads) * cycles + (threads > 1 ? cycles / 8 : 0);
      if (total < best) {
        best = total;
        tasks = count;
        problem.tile_rows = rows;
        problem.row_tasks = row_tasks;
        problem.blocks_per_task = blocks;
      }
    }
  }
  return tasks;
}

}  // namespace

Works conv2d_bf16_work(const TensorView& out, const TensorView& input, const PackedConv2dWeight& weight,
                       const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry,
                       int threads) {
  const Bf16Kernels& table = *kernels().bf16;
  const int64_t groups = weight.spans_groups ? 1 : weight.groups;
  const int64_t width = weight.spans_groups ? kernels().vector_width : kBf16ColumnBlock;
  const EpilogueVectors vectors(epilogue, groups, weight.out_channels / groups, weight.column_blocks * width);

  Conv2dBf16Problem problem;
  set_operands(problem, out, input, prologue, epilogue, vectors);
  problem.geometry = geometry;
  problem.packed_weight = weight.pairs();
  problem.group_in = weight.group_in;
  problem.group_out = weight.group_out;
  problem.column_blocks = weight.column_blocks;
  problem.row_values = bf16_row_values(weight.filter_w, weight.group_in);
  constexpr int64_t kSerialWork = 1 << 19;  // multiplications not worth waking a thread for
  if (out.pixels() * weight.out_channels * weight.group_in * weight.filter_h * weight.filter_w <= kSerialWork) {
    threads = 1;
  }
  Work work;
  work.threads = threads;
  work.constants = weight.pairs();
  work.constant_bytes = weight.bytes();
  if (weight.spans_groups) {
    // One output row and enough channel blocks to be worth a task.
    problem.blocks_per_task = std::min<int64_t>(8, problem.column_blocks);
    work.tasks = out.n * out.h * ceil_div(problem.column_blocks, problem.blocks_per_task);
    work.run = [problem, memory = vectors.memory, &table](int64_t task, void*) {
      table.conv2d_grouped_task(problem, task);
    };
    return {work};
  }
  problem.path = choose_path(problem, prologue.identity());
  const int64_t reduction = weight.filter_h * problem.row_values;
  const int64_t chunks = problem.path == Bf16Path::panel ? ceil_div(reduction, kBf16MaxChunk) : 1;
  problem.chunk = chunks == 1 ? reduction : ceil_div(ceil_div(reduction, chunks), 32) * 32;
  // Room behind a pixel's values for a whole vector, and no multiple of 256 bytes, so that pixels spread over the
  // cache's sets.
  problem.panel_stride = ceil_div(problem.chunk, 32) * 32 + 32;
  if (problem.panel_stride % 128 == 0) problem.panel_stride += 32;
  problem.strip_pixels = (out.w - 1) * geometry.stride_w + weight.filter_w;
  problem.strip_pitch = ceil_div(problem.strip_pixels * weight.group_in, 32) * 32 + 32;

  work.tasks = cut(problem, prologue.identity(), threads);
  work.scratch_bytes = table.conv2d_scratch_bytes(problem);
  work.run = [problem, memory = vectors.memory, &table](int64_t task, void* scratch) {
    table.conv2d_task(problem, task, scratch);
  };
  return {work};
}

}  // namespace fastcnn::cpu
