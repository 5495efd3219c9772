// How a Winograd convolution is cut, and what convolutions cost by each algorithm: estimates of cycles.
#pragma once

#include <cstdint>

#include "conv2d_winograd_phases.h"

namespace fastcnn::cpu {

// Points are of four kinds: in a tile's last row (2), in its last column (1), in both (3), in neither (0). The last
// ones are at infinity, and a tile that is an output short has none of them.
struct WinogradSizes {
  int side;  // points to a tile's side
  int stride;
  int64_t outputs, tiles;  // in the batch; outputs of a channel
  int64_t channel_vectors;
  int64_t words[4];  // of the reduction, over all points of a kind
  double having[4];  // the share of the tiles that have such points
  int64_t column_blocks;
  bool bf16_pairs;  // vectors hold pairs of channels

  int64_t all_words() const { return words[0] + words[1] + words[2] + words[3]; }
  int64_t points(int kind) const { return (kind & 1 ? 1 : side - 1) * (kind & 2 ? 1 : side - 1); }
};

// Of a convolution's p x q outputs in n images. whole: no tile is an output short.
WinogradSizes winograd_sizes(int64_t n, int64_t p, int64_t q, int64_t column_blocks, const WinogradPhases& phases,
                             int tile, int stride, bool bf16_pairs, bool whole);

// A task is a block of tiles and some column blocks: see isa/conv2d_winograd.cpp.
struct WinogradCut {
  int threads = 1;  // more do not pay
  int64_t tiles_per_block = 0, columns_per_task = 0;
  int64_t columns_at_once = 1;  // of them, those whose products are formed before they go back
  double cycles = 0;            // estimated, of the busiest thread
};

// Of the tiles that cover `size` outputs, those that are an output short: 14 = 4 + 4 + 3 + 3. None where they would
// save less than a point in 64: behind whole tiles pooling has all its windows in one.
constexpr int64_t short_tiles(int64_t size, int64_t tile, int64_t side) {
  const int64_t tiles = (size + tile - 1) / tile, beyond = tiles * tile - size, count = beyond < tiles ? beyond : tiles;
  return count * 64 < tiles * side ? 0 : count;
}

// Whether the products of a bf16 weight are formed in bf16, on a processor with bf16 dot products: in 4x4 tiles the
// transforms would enlarge its rounding too much, and of few channels pairs fill no fewer vectors than single values.
bool winograd_by_pairs(int64_t in_channels, int filter, int tile, int stride);

// For at most `threads` threads.
WinogradCut cheapest_cut(const WinogradSizes& sizes, int threads);

// Estimated cycles of a convolution with filter x filter taps on two threads whose weights come from
// memory, as those of a network do: direct (tile 0) or by Winograd in tiles of 6x6, 4x4 or 2x2. bf16: of a bf16 tensor,
// where the processor has bf16 dot products.
double conv2d_cycles(int64_t n, int64_t out_channels, int64_t p, int64_t q, int64_t in_channels, int filter, int stride,
                     int tile, bool bf16);

}  // namespace fastcnn::cpu
