// The estimates behind conv2d_winograd_cut.h. They count with the costs of isa/costs.h, which fit measurements at two
// threads.
#include "conv2d_winograd_cut.h"

#include <algorithm>
#include <cmath>

#include "isa/table.h"
#include "preparation.h"

namespace fastcnn::cpu {
namespace {

// Products and a stream of bytes that is fetched ahead of them: the longer one, and what they take from each other.
double beside(double products, double stream) {
  return std::max(products, stream) + std::min(products, stream) / 4;
}

// Bytes a cycle of a layer's weights when they are met first: of few weights, what lies halfway between the rates of L3
// and of memory. Of a picture smaller than 7x7 that has been found too hopeful.
double weights_rate(double bytes, int64_t outputs) {
  const MachineCosts& costs = kernels().costs;
  const double far = costs.far_bytes_per_cycle;
  return bytes <= costs.near_weights && outputs >= 49 ? (costs.near_bytes_per_cycle + far) / 2 : far;
}

// One cut's cycles.
double cycles_of(const WinogradSizes& sizes, int threads, int64_t tiles, int64_t columns, int64_t at_once) {
  const KernelTable& table = kernels();
  const MachineCosts& costs = table.costs;
  const int64_t blocks = ceil_div(sizes.tiles, tiles), parts = ceil_div(sizes.column_blocks, columns);
  const double points = sizes.side * sizes.side;
  const double channel_vectors = static_cast<double>(sizes.channel_vectors);
  const double words = static_cast<double>(sizes.all_words());
  const double block = static_cast<double>(tiles), part = static_cast<double>(columns);
  const double panel_bytes = block * points * channel_vectors * table.vector_width * 4,
               weight_bytes = words * table.column_block * 4;
  const double products_bytes = block * points * table.column_block * 4;
  // L2 holds the products of the column blocks that are formed together and, of one point, the panel, a block's weights
  // and those fetched ahead. All threads' panels stay in L3.
  const double in_use = static_cast<double>(at_once) * products_bytes + (panel_bytes + 2 * weight_bytes) / points;
  if (tiles > table.micro_rows && (in_use > costs.winograd.l2 || panel_bytes * threads > costs.winograd.l3 / 2))
    return INFINITY;

  // Of one tile and vector of channels, in either direction; of one column block, where the sums of fewer than 4 tiles
  // wait for each other, and with what it takes to begin and end a micro-tile.
  const double there = costs.winograd.there[sizes.side] * (sizes.bf16_pairs ? 0.9 : 1) *
                       (sizes.stride > 1 ? costs.winograd.strided_there : 1);
  const double back = sizes.bf16_pairs ? 160 : costs.winograd.back[sizes.side];
  double products = 0;
  for (int kind = 0; kind < 4; ++kind) {
    const double having = block * sizes.having[kind];  // tiles that have such a point
    const double micro_tiles = std::ceil(having / table.micro_rows);
    products += static_cast<double>(sizes.words[kind]) * std::max(having, 4 * micro_tiles) *
                    (sizes.stride > 1 ? costs.winograd.strided_product : costs.winograd.product) +
                (sizes.stride > 1 ? costs.winograd.strided_micro_tile * sizes.points(kind) * micro_tiles : 0);
  }
  // Of the blocks that a thread passes through with the same weights, the first reads them from memory, the others from
  // L3 if they fit there, or find them in L2.
  const double passes = static_cast<double>(parts < threads ? ceil_div(blocks, threads) : blocks);
  const bool in_l2 =
      part * weight_bytes + panel_bytes + static_cast<double>(at_once) * products_bytes < costs.winograd.l2;
  const double all_weights = static_cast<double>(sizes.column_blocks) * weight_bytes;
  const bool in_l3 = all_weights < costs.winograd.l3;
  const double again = in_l2 ? 0 : 1 / (in_l3 ? costs.near_bytes_per_cycle : costs.far_bytes_per_cycle);
  const double weights = weight_bytes * (1 / weights_rate(all_weights, sizes.outputs) + (passes - 1) * again) / passes;
  const double panel = panel_bytes + in_use < costs.winograd.panel_l2
                           ? 0
                           : panel_bytes / costs.near_bytes_per_cycle / static_cast<double>(at_once);
  const double input_vectors = channel_vectors * (sizes.bf16_pairs ? 2 : 1);
  const double task = part * beside(products, weights + panel) +
                      block * (there * input_vectors + back * part * table.column_block / table.vector_width);
  // Brought into the caches once.
  const double scratch = sizes.stride > 1 ? (panel_bytes + products_bytes) / costs.near_bytes_per_cycle : 0;
  return static_cast<double>(ceil_div(blocks * parts, threads)) * (task + costs.task) + scratch +
         (threads > 1 ? costs.phase : 0);
}

// With few channels to a word of products, what counts is how the output is written: two column blocks together, as
// long as L2 has room for them.
bool writes_by_pairs(const WinogradSizes& sizes, int64_t tiles, int64_t columns) {
  const int64_t points = sizes.side * sizes.side;
  return columns > 1 && sizes.all_words() <= points * 16 &&
         2 * tiles * points * kernels().column_block * 4 <= 256 << 10;
}

}  // namespace

WinogradSizes winograd_sizes(int64_t n, int64_t p, int64_t q, int64_t column_blocks, const WinogradPhases& phases,
                             int tile, int stride, bool bf16_pairs, bool whole) {
  WinogradSizes sizes;
  const int64_t rows = ceil_div(p, tile), columns = ceil_div(q, tile);
  sizes.side = tile + phases.taps() - 1;
  sizes.stride = stride;
  sizes.outputs = n * p * q;
  sizes.tiles = n * rows * columns;
  sizes.channel_vectors = phases.vectors();
  const auto share = [&](int64_t size, int64_t tiles) {
    return whole ? 1 : 1 - static_cast<double>(short_tiles(size, tile, sizes.side)) / static_cast<double>(tiles);
  };
  const double tall = share(p, rows), wide = share(q, columns);
  for (int kind = 0; kind < 4; ++kind) {
    sizes.words[kind] = sizes.points(kind) * phases.words(kind & 2, kind & 1);
    sizes.having[kind] = (kind & 2 ? tall : 1) * (kind & 1 ? wide : 1);
  }
  sizes.column_blocks = column_blocks;
  sizes.bf16_pairs = bf16_pairs;
  return sizes;
}

bool winograd_by_pairs(int64_t in_channels, int filter, int tile, int stride) {
  const KernelTable& table = kernels();
  return table.bf16 != nullptr && filter == 3 && tile == 2 && stride == 1 && in_channels > table.vector_width;
}

WinogradCut cheapest_cut(const WinogradSizes& sizes, int threads) {
  const KernelTable& table = kernels();
  WinogradCut best;
  const auto consider = [&](int team, int64_t blocks, int64_t parts) {
    const int64_t tiles = ceil_div(sizes.tiles, blocks), columns = ceil_div(sizes.column_blocks, parts);
    const bool pairs = writes_by_pairs(sizes, tiles, columns);
    const int64_t most = pairs ? 1 : std::min<int64_t>(columns, table.costs.winograd.columns_at_once);
    for (int64_t at_once = 1; at_once <= most; at_once *= 2) {
      const double cycles = cycles_of(sizes, team, tiles, columns, at_once);
      if (best.cycles == 0 || cycles < best.cycles) best = {team, tiles, columns, pairs ? 2 : at_once, cycles};
    }
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

double conv2d_cycles(int64_t n, int64_t out_channels, int64_t p, int64_t q, int64_t in_channels, int filter, int stride,
                     int tile, bool bf16) {
  const KernelTable& table = kernels();
  const MachineCosts& costs = table.costs;
  constexpr int kThreads = 2;
  const int64_t columns = ceil_div(out_channels, table.column_block);
  if (tile > 0) {
    const bool pairs = bf16 && winograd_by_pairs(in_channels, filter, tile, stride);
    const WinogradPhases phases(filter, stride, in_channels, pairs ? 2 : 1);
    return cheapest_cut(winograd_sizes(n, p, q, columns, phases, tile, stride, pairs, false), kThreads).cycles;
  }
  const int64_t words = ceil_div(filter * filter * in_channels, bf16 ? 2 : 1);  // of the reduction
  const double weight_bytes = static_cast<double>(words * columns * table.column_block * 4);
  const double products = static_cast<double>(n * p * q * words * columns) / kThreads * costs.direct.product;
  return beside(products, weight_bytes / kThreads / weights_rate(weight_bytes, n * p * q)) + costs.phase;
}

}  // namespace fastcnn::cpu
