// Which convolution kernel serves a case. The first line that fits wins.
//
//   kernel      types        serves                                                            where
//   depthwise   all          C/g = K/g = 1, channels aligned                                   CUDA cores
//   grouped     all          groups with C/g < 16 or K/g < 8                                   CUDA cores
//   simt        fp32         exact arithmetic (TF32 not allowed)                               CUDA cores
//   stem wgmma  bf16, fp16   as stem, K > 32                                                   tensor cores, sm_90a
//   stem        bf16, fp16   groups = 1, C <= 4 and nothing between pixels, no dilation, no     tensor cores, sm_80+
//                            prologue, filters that fit in shared memory
//   patch held  bf16, fp16   as patch, 3x3 over at most 64 channels, many pixels               tensor cores, sm_90a
//   patch       bf16, fp16   as tma, several taps, stride 1, few filters                       tensor cores, sm_90a
//   tma         bf16, fp16   aligned output too; groups of 64s of channels; prologue of 1x1    tensor cores, sm_90a
//                            only; not few channels under large filters
//   wgmma       bf16, fp16   groups = 1, aligned, enough tiles for the device                  tensor cores, sm_90a
//   mma         all          the rest: aligned by cp.async; with a prologue by 16-byte         tensor cores, sm_80+
//                            vectors through registers; anything else element by element
//
// Of the tma kernels:
//   tma .. split 2, 4, 8   reductions split over a cluster, for grids that leave most of the device idle
//   tma .. by 32           stages of two blocks of 32 channels, for 96, 160 ... channels
//   tma .. by 96           or of one block of 96: for the tuner, as the estimate cannot tell where they win
//
// "Aligned": the input, its pixel stride, C/g and the filters are multiples of 16 bytes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "conv2d_choice.h"
#include "conv2d_patch_plan.h"
#include "tensor_map.h"

namespace fastcnn::cuda {
namespace {

int64_t tiles(const ConvProblem& problem, int rows, int columns) {
  return ceil_divide(problem.shape.rows, rows) * ceil_divide(problem.shape.filters, columns) * problem.groups;
}

int64_t padded(int64_t filters, int64_t columns) {
  return ceil_divide(filters, columns) * columns;
}

// A wide tile reuses its operands more, as long as it adds no idle columns and the device stays busy.
int mma_columns(const ConvProblem& problem, int64_t multiprocessors) {
  const int64_t filters = problem.shape.filters;
  if (filters <= 32) return 32;
  return padded(filters, 128) <= padded(filters, 64) && tiles(problem, 128, 128) >= multiprocessors ? 128 : 64;
}

LoadPath path_of(const ConvProblem& problem, DType dtype) {
  const ConvShape& shape = problem.shape;
  const int64_t size = size_in_bytes(dtype);
  const bool aligned = aligned_16(problem.input) && aligned_16(problem.weight) && shape.pixel_stride * size % 16 == 0 &&
                       shape.channels * size % 16 == 0 && problem.weight_row_stride * size % 16 == 0;
  return !aligned                 ? LoadPath::staged_elements
         : problem.has_prologue() ? LoadPath::staged_vectors
                                  : LoadPath::async_vectors;
}

bool depthwise_serves(const ConvProblem& problem, DType dtype) {
  const ConvShape& shape = problem.shape;
  const bool vectors =
      problem.vector_output && aligned_16(problem.input) && shape.pixel_stride * size_in_bytes(dtype) % 16 == 0;
  return shape.channels == 1 && shape.filters == 1 && vectors &&
         (dtype == DType::f32    ? depthwise_fits<float>(problem)
          : dtype == DType::bf16 ? depthwise_fits<__nv_bfloat16>(problem)
                                 : depthwise_fits<__half>(problem));
}

bool stem_serves(const ConvProblem& problem, DType dtype, const DeviceFacts& device, bool wgmma) {
  return dtype != DType::f32 && stem_fits(problem, device, wgmma);
}

// Whether a tile's stores stay within the problem's filters: with bulk copies a store writes 64 columns, and only the
// tensor's end stops it; a group is whole columns.
bool whole_columns(const ConvProblem& problem, int columns) {
  const ConvShape& shape = problem.shape;
  const bool stores_beyond = columns == 32 && shape.filters * problem.groups > 32;
  return !stores_beyond && (problem.groups == 1 || shape.filters % columns == 0);
}

// Blocks of 64 channels in the reduction: stages of a tile.
int64_t stages_of(const ConvShape& shape) {
  return shape.reduction / shape.channels * ceil_divide(shape.channels, kTensorMapRow);
}

// The tiles of conv2d_tma.cu that serve a problem that tma_fits, in stages of 64 channels.
std::vector<Choice> tma_choices(const ConvProblem& problem) {
  const auto together = [](LoadPath path, int rows, int columns) {
    return Choice{Kernel::tma, path, rows, columns, false};
  };
  const auto in_turns = [](int columns) { return Choice{Kernel::tma, LoadPath::async_vectors, 128, columns, true}; };
  constexpr LoadPath kStaged = LoadPath::staged_vectors, kAsync = LoadPath::async_vectors;
  std::vector<Choice> found;
  if (problem.has_prologue()) {
    found = {together(kStaged, 128, 128), together(kStaged, 128, 64)};
  } else {
    found = {together(kAsync, 256, 128),
             together(kAsync, 256, 64),
             together(kAsync, 128, 128),
             together(kAsync, 128, 64),
             together(kAsync, 128, 32),
             in_turns(128),
             in_turns(64),
             in_turns(32)};
  }
  found.erase(std::remove_if(found.begin(), found.end(),
                             [&](const Choice& choice) { return !whole_columns(problem, choice.tile_columns); }),
              found.end());
  return found;
}

// Those of conv2d_tma_split.cu: with a stage for each block of a cluster, and not more blocks than twice the device's.
std::vector<Choice> split_choices(const ConvProblem& problem, int64_t multiprocessors) {
  std::vector<Choice> found;
  const LoadPath path = problem.has_prologue() ? LoadPath::staged_vectors : LoadPath::async_vectors;
  for (const int columns : {64, 128}) {
    if ((problem.has_prologue() && columns == 128) || !whole_columns(problem, columns)) continue;
    for (const int split : {2, 4, 8}) {
      if (stages_of(problem.shape) < split || tiles(problem, 128, columns) * split > 2 * multiprocessors) continue;
      found.push_back({Kernel::tma, path, 128, columns, false, split});
    }
  }
  return found;
}

// Stages of two blocks of 32 channels, where a last block of 64 would be at most half full, or of 96, where they are
// fewer then.
std::vector<Choice> other_blocks(const ConvProblem& problem) {
  const int64_t channels = problem.shape.channels;
  std::vector<Choice> found;
  if (problem.groups > 1 || problem.has_prologue() || ceil_divide(channels, kTensorMapHalfRow) % 2 == 0) return found;
  for (const int block : {kTensorMapHalfRow, kTensorMapWideBlock}) {
    const bool fewer = ceil_divide(channels, kTensorMapWideBlock) < ceil_divide(channels, kTensorMapRow);
    if (block == kTensorMapWideBlock && !fewer) continue;
    found.push_back({Kernel::tma, LoadPath::async_vectors, 256, 128, false, 1, block});
    found.push_back({Kernel::tma, LoadPath::async_vectors, 128, 128, true, 1, block});
    found.push_back({Kernel::tma, LoadPath::async_vectors, 128, 64, true, 1, block});
  }
  return found;
}

// Cycles to bring a stage of 64 channels.
double cycles_of_stage(double rows, double columns) {
  return 1.7 * rows + 3.4 * columns + 72;
}

// A stage whose rows the multiplying warps change first, one stage after the other.
constexpr double kPrologueStageCycles = 1300;

// Cycles that a multiprocessor needs for its tiles. A stage takes the longer of multiplying (2048 multiply-adds a
// cycle) and of bringing its rows of A and B. Storing a tile, and fetching its residual, overlaps with multiplying the
// next one where warpgroups take turns. The constants here and below were fitted to the times of 183 cases (layers at
// batch 1, 32 and 256) on an H100 (benchmarks/results/gpu-h100-kernels*.json), where the kernel chosen by them is 1.4 %
// slower than the best one, on average.
double tma_cycles(const ConvProblem& problem, const Choice& choice, int64_t multiprocessors) {
  const ConvShape& shape = problem.shape;
  const double rows = choice.tile_rows, columns = choice.tile_columns;
  const int64_t taps = shape.reduction / shape.channels;
  const double waves =
      static_cast<double>(ceil_divide(tiles(problem, choice.tile_rows, choice.tile_columns), multiprocessors));
  const double products = static_cast<double>(taps * ceil_divide(shape.channels, 16)) * rows * columns * 16;
  const double blocks = static_cast<double>(taps * ceil_divide(shape.channels, choice.block));
  const double stages = std::max(std::ceil(blocks / 2), blocks * choice.block / kTensorMapRow);  // of 64 channels
  double stage = choice.block == kTensorMapHalfRow ? 1.6 * rows + 4.5 * columns + 80 : cycles_of_stage(rows, columns);
  if (problem.has_prologue()) stage = std::max(stage, kPrologueStageCycles);
  const double multiplying = std::max(products / 2048, stages * stage);
  // With a prologue every column tile changes its rows again. The largest tile leaves room for three stages only.
  double starting = problem.has_prologue() ? 2500 : 600;
  if (choice.tile_rows == 256 && choice.tile_columns == 128) starting += 1800;
  double storing = 0.22 * rows * columns;
  if (problem.residual != nullptr) storing *= choice.in_turns ? 1.8 : 1.35;
  return waves * (starting + (choice.in_turns ? std::max(multiplying, storing) : multiplying + storing));
}

// The same for a split reduction: a block's share of the stages at the price above, then two barriers of the cluster,
// and laying down the accumulators and fetching them through distributed shared memory. 512 channels, 3x3 at 7x7 and
// batch 1, 72 stages: 15.8 us without, 13.3, 9.6 and 8.7 us in 2, 4 and 8 parts.
double split_cycles(const ConvProblem& problem, const Choice& choice) {
  const double rows = choice.tile_rows, columns = choice.tile_columns;
  const double stages = static_cast<double>(ceil_divide(stages_of(problem.shape), choice.split));
  const double starting = problem.has_prologue() ? 2500 : 600;
  const double stage = problem.has_prologue() ? kPrologueStageCycles : cycles_of_stage(rows, columns);
  return starting + stages * stage + 1700 + 0.28 * rows * columns;
}

// Where the rule may split: long reductions, whose blocks are all at work at once. Clusters do not find room on all
// multiprocessors (of 8 blocks, 16 do not), hence the eighth that is left free; those of 2 blocks do, on a pair that
// belongs together.
bool worth_splitting(const ConvProblem& problem, const Choice& choice, int64_t multiprocessors) {
  const int64_t room = choice.split == 2 ? multiprocessors : multiprocessors * 7 / 8;
  return stages_of(problem.shape) >= (problem.has_prologue() ? 7 : 24) &&
         tiles(problem, choice.tile_rows, choice.tile_columns) * choice.split <= room;
}

// Tiles that a block walks over, at most.
double tiles_of_a_block(const PatchPlan& plan, const DeviceFacts& device) {
  const int64_t blocks = std::max(device.multiprocessors / plan.column_tiles, 1);
  return static_cast<double>(ceil_divide(plan.tiles, blocks));
}

// The same for the kernel with patches: a product of 64 rows waits for the tensor cores or, with few columns, for
// shared memory; a block first brings its filters.
double patch_cycles(const ConvProblem& problem, int columns, const DeviceFacts& device) {
  const PatchPlan plan = patch_plan(problem, columns, device);
  const int64_t taps = problem.shape.reduction / problem.shape.channels;
  const double products = static_cast<double>(taps * ceil_divide(problem.shape.channels, 16) * (kPatchRows / 64));
  return plan.filter_bytes / 32.0 + tiles_of_a_block(plan, device) * (products * (columns == 64 ? 42 : 25) + 1000);
}

// The same with the filters in registers, where shared memory serves the pixels alone; a block first brings the filters
// there. 64 channels, 3x3 at batch 256: 103 us instead of 133 at 56x56, 1554 instead of 2116 at 224x224.
double held_patch_cycles(const ConvProblem& problem, const DeviceFacts& device) {
  const PatchPlan plan = patch_plan(problem, kHeldPatchColumns, device, true);
  return 4000 + tiles_of_a_block(plan, device) * 6330;  // of a tile 4608 are products
}

Choice best_tma(const ConvProblem& problem, int64_t multiprocessors) {
  const std::vector<Choice> found = tma_choices(problem);
  return *std::min_element(found.begin(), found.end(), [&](const Choice& a, const Choice& b) {
    return tma_cycles(problem, a, multiprocessors) < tma_cycles(problem, b, multiprocessors);
  });
}

// `tma`, or what should be faster of those that split and those by 32.
Choice best_variant(const ConvProblem& problem, const Choice& tma, int64_t multiprocessors) {
  Choice best = tma;
  double cycles = tma_cycles(problem, tma, multiprocessors);
  const auto consider = [&](const Choice& choice, double estimate) {
    if (estimate >= cycles) return;
    best = choice;
    cycles = estimate;
  };
  for (const Choice& choice : other_blocks(problem)) {
    if (choice.block == kTensorMapHalfRow) consider(choice, tma_cycles(problem, choice, multiprocessors));
  }
  for (const Choice& choice : split_choices(problem, multiprocessors)) {
    if (worth_splitting(problem, choice, multiprocessors)) consider(choice, split_cycles(problem, choice));
  }
  return best;
}

Choice best_bulk(const ConvProblem& problem, DType dtype, const DeviceFacts& device) {
  Choice best = best_tma(problem, device.multiprocessors);
  double cycles = tma_cycles(problem, best, device.multiprocessors);
  const auto consider = [&](Kernel kernel, int columns, double estimate) {
    if (estimate >= cycles) return;
    best = {kernel, LoadPath::async_vectors, kPatchRows, columns};
    cycles = estimate;
  };
  if (held_patch_fits(problem, dtype, device)) {
    consider(Kernel::patch_held, kHeldPatchColumns, held_patch_cycles(problem, device));
  }
  for (const int columns : {32, 64}) {
    if (patch_fits(problem, dtype, columns, device)) {
      consider(Kernel::patch, columns, patch_cycles(problem, columns, device));
    }
  }
  return best.kernel == Kernel::tma ? best_variant(problem, best, device.multiprocessors) : best;
}

}  // namespace

std::string name_of(const Choice& choice) {
  const std::string tile = " " + std::to_string(choice.tile_rows) + "x" + std::to_string(choice.tile_columns);
  const char* path = choice.path == LoadPath::async_vectors    ? ""
                     : choice.path == LoadPath::staged_vectors ? " staged"
                                                               : " elements";
  switch (choice.kernel) {
    case Kernel::depthwise:
      return "depthwise";
    case Kernel::grouped:
      return "grouped";
    case Kernel::simt:
      return std::string("simt") + (choice.path == LoadPath::staged_elements ? " elements" : "");
    case Kernel::stem:
      return "stem";
    case Kernel::stem_wgmma:
      return "stem wgmma";
    case Kernel::patch:
      return "patch" + tile;
    case Kernel::patch_held:
      return "patch held";
    case Kernel::tma:
      return "tma" + tile + (choice.in_turns ? " in turns" : path) +
             (choice.split > 1 ? " split " + std::to_string(choice.split) : "") +
             (choice.block != kTensorMapRow ? " by " + std::to_string(choice.block) : "");
    case Kernel::wgmma:
      return "wgmma" + tile + path;
    case Kernel::mma:
      return "mma" + tile + path;
  }
  return "unknown";
}

Choice choose(const ConvProblem& problem, DType dtype, bool allow_tf32, const DeviceFacts& device) {
  const ConvShape& shape = problem.shape;
  const LoadPath path = path_of(problem, dtype);
  if (device.wgmma && problem.groups > 1 && tma_fits(problem, dtype)) return best_bulk(problem, dtype, device);
  if (problem.groups > 1) {
    if (depthwise_serves(problem, dtype)) return {Kernel::depthwise, path};
    if (shape.channels < 16 || shape.filters < 8 || problem.groups > 65535) return {Kernel::grouped, path};
  }
  if (dtype == DType::f32 && !allow_tf32) return {Kernel::simt, path};

  if (stem_serves(problem, dtype, device, true)) return {Kernel::stem_wgmma, path};
  if (stem_serves(problem, dtype, device, false)) return {Kernel::stem, path};

  const int64_t multiprocessors = device.multiprocessors;
  // Few channels leave most of a stage's 64 empty, which counts where a stage is one of many taps.
  const bool fills_stages = shape.channels >= 48 || shape.reduction == shape.channels;
  if (device.wgmma && fills_stages && tma_fits(problem, dtype)) return best_bulk(problem, dtype, device);
  if (device.wgmma && shape.filters > 32 && 2 * tiles(problem, 128, 64) >= multiprocessors) {
    if (dtype != DType::f32 && problem.groups == 1 && path != LoadPath::staged_elements) {
      int columns = mma_columns(problem, multiprocessors);
      if (path == LoadPath::async_vectors && shape.filters % 256 == 0 &&
          tiles(problem, 128, 256) >= 2 * multiprocessors)
        columns = 256;
      return {Kernel::wgmma, path, 128, columns};
    }
  }
  if (path == LoadPath::staged_elements) return {Kernel::mma, path, 64, 64};
  int columns = mma_columns(problem, multiprocessors);
  if (path == LoadPath::staged_vectors) columns = std::min(columns, 64);
  const bool few = columns == 64 && tiles(problem, 128, 64) < multiprocessors;
  return {Kernel::mma, path, few ? 64 : 128, columns};
}

std::vector<Choice> choices(const ConvProblem& problem, DType dtype, bool allow_tf32, const DeviceFacts& device) {
  std::vector<Choice> found = {choose(problem, dtype, allow_tf32, device)};
  const auto add = [&](const Choice& choice) {
    const std::string name = name_of(choice);
    for (const Choice& known : found) {
      if (name_of(known) == name) return;
    }
    found.push_back(choice);
  };
  const LoadPath path = path_of(problem, dtype);
  if (found[0].kernel == Kernel::depthwise || problem.groups > 65535) return found;
  if (problem.groups > 1) add({Kernel::grouped, path});
  if (dtype == DType::f32 && !allow_tf32) {
    add({Kernel::simt, path});
    return found;
  }
  if (stem_serves(problem, dtype, device, false)) add({Kernel::stem, path});
  if (device.wgmma && tma_fits(problem, dtype)) {
    for (const Choice& choice : tma_choices(problem)) add(choice);
    for (const Choice& choice : split_choices(problem, device.multiprocessors)) add(choice);
    for (const Choice& choice : other_blocks(problem)) add(choice);
    for (const int columns : {32, 64}) {
      if (patch_fits(problem, dtype, columns, device)) {
        add({Kernel::patch, LoadPath::async_vectors, kPatchRows, columns});
      }
    }
    if (held_patch_fits(problem, dtype, device)) {
      add({Kernel::patch_held, LoadPath::async_vectors, kPatchRows, kHeldPatchColumns});
    }
  }
  if (device.wgmma && dtype != DType::f32 && problem.groups == 1 && path != LoadPath::staged_elements) {
    for (const int columns : {64, 128}) add({Kernel::wgmma, path, 128, columns});
    if (path == LoadPath::async_vectors) add({Kernel::wgmma, path, 128, 256});
  }
  add({Kernel::mma, path, 64, 64});
  if (path != LoadPath::staged_elements) {
    for (const int columns : {32, 64}) add({Kernel::mma, path, 128, columns});
    if (path == LoadPath::async_vectors) add({Kernel::mma, path, 128, 128});
  }
  return found;
}

}  // namespace fastcnn::cuda
