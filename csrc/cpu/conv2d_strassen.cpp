// 1x1 convolution by Strassen's algorithm on the CPU: the cut into tasks and the work. The arithmetic is in
// isa/conv2d_strassen.cpp.
#include "conv2d_strassen.h"

#include <algorithm>

#include "isa/table.h"
#include "preparation.h"
#include "work.h"

namespace fastcnn::cpu {
namespace {

constexpr int64_t kChunk =
    256;  // most channels of a chunk: 7 quadrants of weights and as many of the input in L1 and L2

// How sums are formed: by the shapes alone.
struct Form {
  int64_t chunk_half, chunks, blocks_per_image, pairs;

  Form(int64_t pixels, int64_t in_channels, int64_t out_channels) {  // pixels: of an image
    const KernelTable& table = kernels();
    const int64_t half = in_channels / 2, wanted = ceil_div(in_channels, kChunk);
    chunk_half = ceil_div(ceil_div(half, wanted), 16) * 16;
    chunks = ceil_div(half, chunk_half);
    blocks_per_image = ceil_div(pixels, 2 * table.micro_rows);
    pairs = ceil_div(ceil_div(out_channels, table.column_block), 2);
  }
};

struct Cut {
  int64_t pixel_blocks_per_task = 0, pairs_per_task = 0;
  double cycles = 0;  // estimated, of the busiest thread
};

// It counts with the costs of isa/costs.h.
Cut cheapest_cut(const Form& form, int64_t images, int64_t pixels, int64_t in_channels, bool in_place, int threads) {
  const KernelTable& table = kernels();
  const MachineCosts& costs = table.costs;
  const double input_bytes = static_cast<double>(images * pixels * in_channels * 4);
  // Copies beside the sums are stores alone.
  const double bring_cycles =
      (input_bytes <= costs.strassen.near_input ? costs.strassen.near_sums : costs.strassen.far_sums) *
      (in_place ? 1 : 1.45);
  const double width = table.vector_width, channels = static_cast<double>(in_channels);
  const double rows = static_cast<double>(ceil_div(pixels, 2)) / static_cast<double>(form.blocks_per_image);
  const int64_t pixel_blocks = images * form.blocks_per_image;
  const double pair_bytes = channels * table.column_block * 8;
  Cut best;
  for (int64_t row_parts = 1; row_parts <= pixel_blocks; ++row_parts) {
    const int64_t blocks = ceil_div(pixel_blocks, row_parts);
    if (ceil_div(pixel_blocks, blocks) != row_parts) continue;
    for (int64_t column_parts = 1; column_parts <= std::min<int64_t>(form.pairs, 4 * threads); ++column_parts) {
      const int64_t pairs = ceil_div(form.pairs, column_parts);
      if (ceil_div(form.pairs, pairs) != column_parts) continue;
      const double tiles = static_cast<double>(blocks * pairs), chunks = static_cast<double>(form.chunks);
      const double ends = rows * 2 * 4 * costs.strassen.end, begun = 7 * costs.strassen.step;  // of a tile's chunk
      const double products = tiles * (3.5 * channels * rows * costs.strassen.product + chunks * (ends + begun));
      const double input = static_cast<double>(blocks) * 2 * rows * channels;  // values
      const double panel = input * (in_place ? 1 : 1.75);
      // Where L2 does not hold all, the panel comes from L3 again for each pair.
      const double chunk_bytes = 4 * panel / chunks,
                   partial = chunks > 1 ? tiles * rows * 4 * table.column_block * 4 : 0;
      const double in_use = chunk_bytes + partial + 2 * pair_bytes / chunks;
      const double missing = std::min(1.0, std::max(0.0, in_use / costs.strassen.l2 - 1));
      const double again = missing * static_cast<double>(pairs) * 4 * panel / costs.near_bytes_per_cycle;
      // Weights come from memory, mostly hidden behind products.
      const int64_t own_pairs = column_parts < threads ? form.pairs : pairs * ceil_div(column_parts, threads);
      const double weights = static_cast<double>(own_pairs) * pair_bytes * 0.2 / costs.far_bytes_per_cycle;
      const double formed = static_cast<double>(pairs) * 2 * channels * costs.strassen.form;
      const double task = products + formed + input / width * bring_cycles + again + costs.task;
      const double cycles = task * static_cast<double>(ceil_div(row_parts * column_parts, threads)) + weights +
                            (threads > 1 ? costs.phase : 0);
      if (best.cycles == 0 || cycles < best.cycles) best = {blocks, pairs, cycles};
    }
  }
  return best;
}

// Pixels a multiple of 4 KiB apart would meet in one set of L1.
bool readable_in_place(int64_t pixel_stride) {
  return pixel_stride * 4 % 4096 != 0;
}

}  // namespace

const char* conv2d_strassen_refusal(const PackedConv2dWeight& weight, DType dtype) {
  if (weight.filter_h != 1 || weight.filter_w != 1 || weight.groups != 1) {
    return "weight must have shape (K, C, 1, 1) and one group for Strassen's algorithm";
  }
  if (weight.in_channels % 2 != 0) return "weight must have an even number of input channels for Strassen's algorithm";
  if (weight.bf16_pairs || dtype != DType::f32) return "input and weight must be float32 for Strassen's algorithm";
  return nullptr;
}

double conv2d_strassen_cycles(int64_t images, int64_t pixels, int64_t out_channels, int64_t in_channels) {
  constexpr int kThreads = 2;
  const Form form(pixels, in_channels, out_channels);
  return cheapest_cut(form, images, pixels, in_channels, readable_in_place(in_channels), kThreads).cycles;
}

Works conv2d_strassen_work(const TensorView& out, const TensorView& input, const PackedConv2dWeight& weight,
                           const Prologue& prologue, const Epilogue& epilogue, int threads) {
  const KernelTable& table = kernels();
  const EpilogueVectors vectors(epilogue, 1, weight.out_channels, weight.column_blocks * table.column_block);
  const int64_t pixels = out.h * out.w;
  const Form form(pixels, weight.in_channels, weight.out_channels);

  StrassenProblem p{};
  set_operands(p, out, input, prologue, epilogue, vectors);
  p.packed_weight = weight.data();
  p.in_channels = weight.in_channels;
  p.out_channels = weight.out_channels;
  p.column_blocks = weight.column_blocks;
  p.in_place = !p.has_prologue() && readable_in_place(input.pixel_stride);
  p.chunk_half = form.chunk_half;
  p.blocks_per_image = form.blocks_per_image;
  const Cut cut = cheapest_cut(form, out.n, pixels, weight.in_channels, p.in_place, threads);
  p.pixel_blocks_per_task = cut.pixel_blocks_per_task;
  p.pairs_per_task = cut.pairs_per_task;
  p.row_tasks = ceil_div(out.n * p.blocks_per_image, p.pixel_blocks_per_task);

  Work work;
  work.tasks = p.row_tasks * ceil_div(form.pairs, p.pairs_per_task);
  work.threads = threads;
  work.scratch_bytes = table.strassen_scratch_bytes(p);
  work.run = [p, memory = vectors.memory, &table](int64_t task, void* scratch) {
    table.strassen_task(p, task, scratch);
  };
  work.constants = weight.data();
  work.constant_bytes = weight.bytes();
  return {work};
}

void conv2d_strassen(const TensorView& out, const TensorView& input, const PackedConv2dWeight& weight,
                     const Prologue& prologue, const Epilogue& epilogue, int threads) {
  run_now(conv2d_strassen_work(out, input, weight, prologue, epilogue, threads));
}

}  // namespace fastcnn::cpu
