// Where a stem convolution's values sit in shared memory, and which value each k of its matrix product is.
//
// Band: the input rows under a tile, channels innermost as in global memory, zeros outside the image. A pixel takes
//   `pixel` elements: C where stride_w * C is even, else C + 1 with a zero behind the channels, so that all windows
//   of a row start at elements of one parity. Rows start at a multiple of 8 elements of the image row.
// Pairs: a window's part of one filter row is S * pixel neighbouring elements, read as 32-bit words. Where windows
//   start at odd elements, the words start one element earlier. So a row has ceil((odd + S * pixel) / 2) pairs, and
//   k runs over the pairs of all R rows without a gap: 7x7x3 takes 77 pairs, 154 of 160 values of k.
// Masks: the first pair's low half and the last pair's high half may belong to a neighbouring pixel. Its weight is 0,
//   but 0 * NaN is not, so the half is masked; so are whole pairs past the last.
// Filters: the accumulators of four products of 8 columns give a lane columns 2t, 2t+1 of each (t = lane % 4). The
//   filters are dealt to the columns so that these are eight neighbouring filters: one 16-byte store, no exchange.
#pragma once

#include <cstdint>

#include "conv_index.h"
#include "fast_divide.h"
#include "portable.h"
#include "tile_layout.h"

namespace fastcnn::cuda {

struct StemPlan {
  int32_t filter_h = 1, filter_w = 1;
  int32_t out_h = 1, out_w = 1;         // P, Q
  int32_t tile_h = 1, tile_w = 1;       // output rows and columns of a tile
  int32_t tiles = 0;                    // of all images
  int32_t pixel = 1;                    // elements of a pixel in the band
  int32_t odd = 0;                      // windows start at odd elements
  int32_t pairs = 0;                    // of a filter row
  int32_t steps = 0;                    // of 8 pairs
  int32_t band_rows = 0, band_row = 0;  // rows of the band, elements of a row (a multiple of 8)
  int32_t row_step = 1, half_step = 8;  // pixels between a product's rows, and from its row r to row r + 8
  bool vectors = false;                 // image rows are whole, aligned 16-byte vectors, and pixel = C
  FastDivisor by_tile_w, by_tiles_w, by_tiles_h, by_pairs, by_depth;
  FastDivisor by_band_row;  // vectors or words of a band row, whatever the loads are
  int32_t warps = 1;
  int32_t weight_bytes = 0;  // of a block
  // Host only.
  int32_t alignment = 0;    // bytes that may be lost before the weights
  int32_t columns = 0;      // filters of a block
  int32_t most_blocks = 1;  // along the tiles

  FASTCNN_HD int tap_bytes() const { return (steps + 2) * 64; }
  FASTCNN_HD int coefficient_bytes() const { return columns * 8; }
  FASTCNN_HD int shared_bytes() const {
    return alignment + weight_bytes + tap_bytes() + coefficient_bytes() + 2 * band_bytes();
  }
  FASTCNN_HD int band_bytes() const { return band_rows * band_row * 2; }
};

// Where a lane finds its two pairs of a step, relative to a window's start in the band, and their masks.
struct alignas(16) StemTap {
  uint32_t offset, mask, next_offset, next_mask;
};

FASTCNN_HD void stem_pair(const StemPlan& plan, int pair, uint32_t& offset, uint32_t& mask) {
  offset = mask = 0;
  if (pair >= plan.filter_h * plan.pairs) return;
  int32_t in_row;
  const int32_t r = plan.by_pairs.divide(pair, in_row);
  const int32_t element = 2 * in_row - plan.odd;
  offset = static_cast<uint32_t>(2 * (r * plan.band_row + 2 * in_row));
  mask = (element < 0 ? 0u : 0x0000ffffu) | (element + 1 >= plan.filter_w * plan.pixel ? 0u : 0xffff0000u);
}

// The taps of lanes with t = lane % 4.
FASTCNN_HD StemTap stem_tap(const StemPlan& plan, int step, int t) {
  StemTap tap;
  stem_pair(plan, 8 * step + t, tap.offset, tap.mask);
  stem_pair(plan, 8 * step + 4 + t, tap.next_offset, tap.next_mask);
  return tap;
}

// Weights lie in the order in which lanes read them, 16 bytes for two products: word index of a filter's pair.
FASTCNN_HD int stem_weight_word(int columns, int filter, int pair) {
  const int step = pair / 8, slot = pair % 8;
  const int product = filter / 32 * 4 + filter % 8 / 2;
  const int lane = (filter % 32 / 8 * 2 + filter % 2) * 4 + slot % 4;
  return ((step * (columns / 16) + product / 2) * 32 + lane) * 4 + product % 2 * 2 + slot / 4;
}

// For wgmma, weights are tiles of 64 values of k (tile_layout.h), filters in the same order.
FASTCNN_HD int stem_wgmma_word(int columns, int filter, int pair) {
  const int row = (filter / 32 * 4 + filter % 8 / 2) * 8 + filter % 32 / 8 * 2 + filter % 2;
  const int offset = pair / 32 * columns * 128 + static_cast<int>(tile_offset<128>(row, pair % 32 / 4));
  return offset / 4 + pair % 4;
}

struct StemTile {
  int32_t image, p, q;  // the tile's first output row and column
};

FASTCNN_HD StemTile stem_tile(const StemPlan& plan, int32_t tile) {
  int32_t across, down;
  const int32_t row_of_tiles = plan.by_tiles_w.divide(tile, across);
  const int32_t image = plan.by_tiles_h.divide(row_of_tiles, down);
  return {image, down * plan.tile_h, across * plan.tile_w};
}

// The even element of the image row at or before which the tile's first window starts.
FASTCNN_HD int32_t stem_start(const StemPlan& plan, const ConvShape& shape, const StemTile& tile) {
  return (tile.q * shape.stride_w - shape.pad_left) * plan.pixel - plan.odd;
}

// Output rows of the tile that the image has.
FASTCNN_HD int stem_tile_rows(const StemPlan& plan, const StemTile& tile) {
  return tile.p + plan.tile_h < plan.out_h ? plan.tile_h : plan.out_h - tile.p;
}

// Where in the band the window of the tile's `pixel` starts, in bytes. row: the output pixel of the whole layer, or -1
// for one that is not there (its window is the band's start: real memory, no result).
FASTCNN_HD uint32_t stem_window(const StemPlan& plan, const ConvShape& shape, const StemTile& tile, int pixel,
                                int32_t& row) {
  int32_t across;
  const int down = plan.by_tile_w.divide(pixel, across);
  const int lead = stem_start(plan, shape, tile) & 7;
  const bool real = down < stem_tile_rows(plan, tile) && tile.q + across < plan.out_w;
  row = real ? (tile.image * plan.out_h + tile.p + down) * plan.out_w + tile.q + across : -1;
  const int element = down * shape.stride_h * plan.band_row + across * shape.stride_w * plan.pixel + lead;
  return real ? static_cast<uint32_t>(2 * element) : 0;
}

}  // namespace fastcnn::cuda
