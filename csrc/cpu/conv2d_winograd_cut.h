// How a Winograd convolution is cut, and what convolutions cost by each algorithm: estimates of cycles.
#pragma once

#include <cstdint>

namespace fastcnn::cpu {

struct WinogradSizes {
  int side;  // points to a tile's side
  int stride;
  int64_t tiles;  // in the batch
  int64_t channel_vectors;
  int64_t words;  // of the reduction, over all points
  int64_t column_blocks;
  bool bf16_pairs;  // vectors hold pairs of channels
};

// A task is a block of tiles and some column blocks: see isa/conv2d_winograd.cpp.
struct WinogradCut {
  int threads = 1;  // more do not pay
  int64_t tiles_per_block = 0, columns_per_task = 0;
  int64_t columns_at_once = 1;  // of them, those whose products are formed before they go back
  double cycles = 0;            // estimated, of the busiest thread
};

// Whether the products of a bf16 weight are formed in bf16, on a processor with bf16 dot products: in 4x4 tiles the
// transforms would enlarge its rounding too much, and of few channels pairs fill no fewer vectors than single values.
bool winograd_by_pairs(int64_t in_channels, int filter, int tile, int stride);

// For at most `threads` threads.
WinogradCut cheapest_cut(const WinogradSizes& sizes, int threads);

// Estimated cycles of a convolution with filter x filter taps on two threads whose weights come from
// memory, as those of a network do: direct (tile 0) or by Winograd in tiles of 4x4 or 2x2. bf16: of a bf16 tensor,
// where the processor has bf16 dot products.
double conv2d_cycles(int64_t n, int64_t out_channels, int64_t p, int64_t q, int64_t in_channels, int filter, int stride,
                     int tile, bool bf16);

}  // namespace fastcnn::cpu
