// Convolution in bf16 arithmetic on the CPU: weight packing and the cut into tasks. The arithmetic is in
// isa/conv2d_bf16.cpp.
#include "conv2d_bf16.h"

#include <algorithm>
#include <memory>

#include "isa/table.h"
#include "work.h"

namespace fastcnn::cpu {

void pack_bf16_pairs(const PackedConv2dWeight& shape, const uint16_t* weight, const int64_t strides[4],
                     uint16_t* packed) {
  const int64_t row_values = bf16_row_values(shape.filter_w, shape.group_in);
  const int64_t reduction = shape.filter_h * row_values;
  for (int64_t k = 0; k < shape.out_channels; ++k) {
    const int64_t group = k / shape.group_out, column = k % shape.group_out;
    uint16_t* block =
        packed + (group * shape.column_blocks + column / kBf16ColumnBlock) * reduction * kBf16ColumnBlock;
    uint16_t* to = block + column % kBf16ColumnBlock * 2;
    for (int64_t r = 0; r < shape.filter_h; ++r) {
      for (int64_t s = 0; s < shape.filter_w; ++s) {
        const uint16_t* from = weight + k * strides[0] + r * strides[2] + s * strides[3];
        const int64_t first = r * row_values + s * shape.group_in;
        for (int64_t c = 0; c < shape.group_in; ++c) {
          const int64_t value = first + c;
          to[value / 2 * 2 * kBf16ColumnBlock + value % 2] = from[c * strides[1]];
        }
      }
    }
  }
}

namespace {

// How many pixels and column blocks a task owns: of some candidates the one whose last thread is done first, by an
// estimate in cycles.
int64_t cut(Conv2dBf16Problem& problem, int threads) {
  const int64_t groups = problem.geometry.groups;
  const int64_t pixels = problem.out.pixels();
  const int64_t micro_tiles = ceil_div(pixels, kBf16MicroRows);
  const int64_t reduction = problem.geometry.filter_h * problem.row_values;
  const int64_t block_cycles = reduction / 2;  // per pixel and column block
  const bool prologue = problem.input_scale != nullptr || problem.input_shift != nullptr || problem.input_relu;
  const int64_t taps = problem.geometry.filter_h * problem.geometry.filter_w;
  const int64_t gather_cycles = problem.in_place ? 0 : reduction / (prologue ? 6 : 16) + 8 * taps;  // per pixel
  // Weights beyond L2 come from L3 or memory for every task.
  constexpr int64_t kCachedWeightBytes = 512 << 10, kBytesPerCycle = 12, kTaskCycles = 500;
  const int64_t block_bytes = reduction * kBf16ColumnBlock * 2;
  const bool streams = problem.column_blocks * block_bytes > kCachedWeightBytes;
  const int64_t stream_cycles = streams ? block_bytes / kBytesPerCycle : 0;  // per column block

  int64_t best = INT64_MAX, tasks = 0;
  for (const int64_t tiles : {8, 4, 2, 1}) {
    if (tiles > 1 && tiles / 2 >= micro_tiles) continue;
    const int64_t rows = ceil_div(pixels, ceil_div(micro_tiles, tiles));
    const int64_t row_tasks = ceil_div(pixels, rows);
    for (int64_t splits = 1; splits < 2 * problem.column_blocks && splits <= 32; splits *= 2) {
      const int64_t blocks = ceil_div(problem.column_blocks, splits);
      const int64_t count = row_tasks * ceil_div(problem.column_blocks, blocks) * groups;
      const int64_t compute = blocks * rows * block_cycles;
      const int64_t cycles = std::max(compute, blocks * stream_cycles) + rows * gather_cycles + kTaskCycles;
      const int64_t total = ceil_div(count, threads) * cycles;
      if (total < best) {
        best = total;
        tasks = count;
        problem.tile_rows = rows;
        problem.blocks_per_task = blocks;
      }
    }
  }
  const int64_t chunks = ceil_div(reduction, kBf16MaxChunk);
  problem.chunk = problem.in_place ? reduction : ceil_div(ceil_div(reduction, chunks), 32) * 32;
  // Room behind a pixel's values for a whole vector, and no multiple of 256 bytes, so that pixels spread over the
  // cache's sets.
  problem.panel_stride = ceil_div(problem.chunk, 32) * 32 + 32;
  if (problem.panel_stride % 128 == 0) problem.panel_stride += 32;
  return tasks;
}

}  // namespace

Works conv2d_bf16_work(const TensorView& out, const TensorView& input, const PackedConv2dWeight& weight,
                       const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry,
                       int threads) {
  const Bf16Kernels& table = *kernels().bf16;
  const EpilogueVectors vectors(epilogue, weight.groups, weight.group_out, weight.column_blocks * kBf16ColumnBlock);

  Conv2dBf16Problem problem;
  problem.out = out;
  problem.input = input;
  problem.geometry = geometry;
  problem.packed_weight = weight.pairs();
  problem.group_in = weight.group_in;
  problem.group_out = weight.group_out;
  problem.column_blocks = weight.column_blocks;
  problem.input_scale = prologue.scale;
  problem.input_shift = prologue.shift;
  problem.input_relu = prologue.relu;
  problem.scale = vectors.scale;
  problem.bias = vectors.bias;
  problem.residual = epilogue.residual;
  problem.relu = epilogue.activation == Activation::relu;
  problem.row_values = bf16_row_values(weight.filter_w, weight.group_in);
  // Pixels a multiple of 4 KiB apart would share one set of L1.
  const bool one_set = input.pixel_stride % 2048 == 0;
  problem.in_place = weight.filter_h == 1 && weight.filter_w == 1 && geometry.stride_h == 1 && geometry.stride_w == 1 &&
                     geometry.pad_top == 0 && geometry.pad_left == 0 && out.h == input.h && out.w == input.w &&
                     prologue.identity() && weight.group_in % 2 == 0 && !one_set;

  constexpr int64_t kSerialWork = 1 << 19;  // multiplications not worth waking a thread for
  if (out.pixels() * weight.out_channels * weight.group_in * weight.filter_h * weight.filter_w <= kSerialWork) {
    threads = 1;
  }
  Work work;
  work.threads = threads;
  work.tasks = cut(problem, threads);
  work.scratch_bytes = table.conv2d_scratch_bytes(problem);
  work.run = [problem, memory = vectors.memory, &table](int64_t task, void* scratch) {
    table.conv2d_task(problem, task, scratch);
  };
  return {work};
}

}  // namespace fastcnn::cpu
