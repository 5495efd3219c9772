// The estimates behind conv2d_winograd_cut.h. The constants fit measurements with AVX-512 at two threads (a core with
// two FMA units, 1 MiB of L2, 32 MiB of L3 shared, memory at some 12 bytes a cycle); a choice made by them is wrong by
// what they are off, never in its result.
#include "conv2d_winograd_cut.h"

#include <algorithm>
#include <cmath>

#include "isa/table.h"
#include "preparation.h"

namespace fastcnn::cpu {
namespace {

constexpr double kL2 = 832 << 10, kL3 = 16 << 20;                 // of which a thread, or all, may fill this much
constexpr double kNearBytesPerCycle = 12, kFarBytesPerCycle = 9;  // for a thread, from L3 and from memory
constexpr double kPhaseCycles = 6000, kTaskCycles = 1000;         // until all threads have come; to begin a task

// Products and a stream of bytes that is fetched ahead of them: the longer one, and what they take from each other.
double beside(double products, double stream) {
  return std::max(products, stream) + std::min(products, stream) / 4;
}

// One cut's cycles.
double cycles_of(const WinogradSizes& sizes, int threads, int64_t tiles, int64_t columns) {
  const KernelTable& table = kernels();
  const int64_t blocks = ceil_div(sizes.tiles, tiles), parts = ceil_div(sizes.column_blocks, columns);
  const double points = sizes.side * sizes.side;
  const double channel_vectors = static_cast<double>(sizes.channel_vectors);
  const double channels = channel_vectors * table.vector_width;
  const double block = static_cast<double>(tiles), part = static_cast<double>(columns);
  const double panel_bytes = block * points * channels * 4, weight_bytes = points * channels * table.column_block * 4;
  const double products_bytes = block * points * table.column_block * 4;
  // L2 holds the products of a column block and, of one point, the panel, the weights and those fetched ahead. All
  // threads' panels stay in L3.
  const double in_use = products_bytes + (panel_bytes + 2 * weight_bytes) / points;
  if (tiles > table.micro_rows && (in_use > kL2 || panel_bytes * threads > kL3 / 2)) return INFINITY;

  // Of one tile and vector of channels, in either direction; of one column block, where the sums of fewer than 4 tiles
  // wait for each other.
  const double there = sizes.side == 6 ? 270 : sizes.bf16_pairs ? 80 : 90;
  const double back = sizes.side == 6 ? 270 : sizes.bf16_pairs ? 160 : 90;
  const double products =
      points * channels * static_cast<double>(std::max(tiles, 4 * ceil_div(tiles, table.micro_rows))) * 1.06;
  // Of the blocks that a thread passes through with the same weights, the first reads them from memory, the others from
  // L3 if they fit there, or find them in L2.
  const double passes = static_cast<double>(parts < threads ? ceil_div(blocks, threads) : blocks);
  const bool in_l2 = part * weight_bytes + panel_bytes + products_bytes < kL2;
  const bool in_l3 = static_cast<double>(sizes.column_blocks) * weight_bytes < kL3;
  const double again = in_l2 ? 0 : 1 / (in_l3 ? kNearBytesPerCycle : kFarBytesPerCycle);
  const double weights = weight_bytes * (1 / kFarBytesPerCycle + (passes - 1) * again) / passes;
  const double panel = panel_bytes + in_use < kL2 ? 0 : panel_bytes / kNearBytesPerCycle;
  const double input_vectors = channel_vectors * (sizes.bf16_pairs ? 2 : 1);
  const double task = part * beside(products, weights + panel) +
                      block * (there * input_vectors + back * part * table.column_block / table.vector_width);
  return static_cast<double>(ceil_div(blocks * parts, threads)) * (task + kTaskCycles) +
         (threads > 1 ? kPhaseCycles : 0);
}

}  // namespace

bool winograd_by_pairs(int64_t in_channels, int side) {
  return side == 4 && in_channels > kernels().vector_width;
}

WinogradCut cheapest_cut(const WinogradSizes& sizes, int threads) {
  const KernelTable& table = kernels();
  WinogradCut best;
  const auto consider = [&](int team, int64_t blocks, int64_t parts) {
    const int64_t tiles = ceil_div(sizes.tiles, blocks), columns = ceil_div(sizes.column_blocks, parts);
    const double cycles = cycles_of(sizes, team, tiles, columns);
    if (best.cycles == 0 || cycles < best.cycles) best = {team, tiles, columns, cycles};
  };
  for (int64_t micro_tiles = 1; micro_tiles <= 16; ++micro_tiles) {
    const int64_t blocks = ceil_div(sizes.tiles, micro_tiles * table.micro_rows);
    consider(1, blocks, 1);
    if (threads == 1) continue;
    consider(threads, ceil_div(blocks, threads) * threads, 1);
    for (int64_t parts = 1; parts <= std::min<int64_t>(sizes.column_blocks, 4 * threads); ++parts) {
      consider(threads, blocks, parts);
    }
  }
  return best;
}

double conv2d_cycles(int64_t n, int64_t out_channels, int64_t p, int64_t q, int64_t in_channels, int filter, int tile,
                     bool bf16) {
  const KernelTable& table = kernels();
  constexpr int kThreads = 2;
  const int64_t columns = ceil_div(out_channels, table.column_block);
  if (tile > 0) {
    const int64_t tiles = n * ceil_div(p, tile) * ceil_div(q, tile);
    const int side = tile + filter - 1;
    const bool pairs = bf16 && winograd_by_pairs(in_channels, side);
    const int64_t channel_vectors = ceil_div(in_channels, pairs ? 2 * table.vector_width : table.vector_width);
    return cheapest_cut({side, tiles, channel_vectors, columns, pairs}, kThreads).cycles;
  }
  const int64_t words = ceil_div(filter * filter * in_channels, bf16 ? 2 : 1);  // of the reduction
  const double weight_values = static_cast<double>(words * columns * table.column_block);
  const double products = static_cast<double>(n * p * q * words * columns) / kThreads * 1.14;
  return beside(products, weight_values * 4 / kThreads / kFarBytesPerCycle) + kPhaseCycles;
}

}  // namespace fastcnn::cpu
