// How a stem convolution with the max pooling behind it (conv2d_stem_pool.cu) is cut up.
//
// Windows are 3x3 with stride 2, padding 0 or 1: output row p takes convolution rows 2p - pad, +1 and +2, and its last
//   row is the next one's first.
// Walk: some output rows of a strip of columns of one image, from top to bottom: 2 * rows + 1 convolution rows. Only
//   the first of them belongs to another walk as well. It is cut into tiles of `stem.tile_h` convolution rows, each
//   with a band of input rows.
// Strip: convolution columns 2 * first - pad and on, stem.tile_w of them, 64 for each warpgroup. A column or row may
//   lie outside the convolution's output, before its start or behind its end: then no window counts it.
// Staged row: the maxima over three convolution rows, 128 bytes of 64 filters for each column of the strip.
#pragma once

#include <cstdint>

#include "fast_divide.h"
#include "portable.h"
#include "stem_layout.h"

namespace fastcnn::cuda {

constexpr int kStemPoolColumns = 64;  // filters of a block

struct StemPoolPlan {
  StemPlan stem;                      // its tiles, of a walk; tile_h, tile_w in the convolution's rows and columns
  int32_t out_h = 1, out_w = 1;       // of the pooling
  int32_t pad_top = 0, pad_left = 0;  // of the pooling
  int32_t rows = 1, columns = 1;      // of the pooling's output: of a walk, of a strip
  int32_t walks = 0;                  // of all images
  FastDivisor by_strips, by_walks;    // strips of an image, walks down an image

  FASTCNN_HD int staged_bytes() const { return stem.warps / 4 * 64 * kStemPoolColumns * 2; }
  FASTCNN_HD int shared_bytes() const { return stem.shared_bytes() + 2 * staged_bytes(); }
};

struct StemWalk {
  int32_t image, p, q;  // first row and column of the pooling's output
  int32_t rows;         // of that output
};

FASTCNN_HD StemWalk stem_walk(const StemPoolPlan& plan, int32_t walk) {
  int32_t across, down;
  const int32_t row_of_walks = plan.by_strips.divide(walk, across);
  const int32_t image = plan.by_walks.divide(row_of_walks, down);
  const int32_t p = down * plan.rows;
  return {image, p, across * plan.columns, p + plan.rows < plan.out_h ? plan.rows : plan.out_h - p};
}

// A walk's tile as the stem's bands know it; p and q may be negative.
FASTCNN_HD StemTile stem_walk_tile(const StemPoolPlan& plan, const StemWalk& walk, int32_t tile) {
  return {walk.image, 2 * walk.p - plan.pad_top + tile * plan.stem.tile_h, 2 * walk.q - plan.pad_left};
}

// Where in the band the window of a column of the strip starts, in bytes, in the tile's first row. A column behind the
// strip's end gets the last one's window: real memory, no result. So does the column half_step further, for which the
// band's rows are long enough.
FASTCNN_HD uint32_t stem_column_window(const StemPlan& plan, const ConvShape& shape, const StemTile& tile, int column) {
  const int there = column < plan.tile_w ? column : plan.tile_w - 1;
  return static_cast<uint32_t>(2 * (there * shape.stride_w * plan.pixel + (stem_start(plan, shape, tile) & 7)));
}

// Where 16 bytes of a staged row lie: `vector` of 8 filters of a column. Eight lanes that store four vectors each of
// two columns, neighbours or two apart, meet in no bank.
FASTCNN_HD int staged_offset(int column, int vector) {
  return column * 128 + ((vector ^ ((column ^ column >> 1) & 1) << 2) << 4);
}

}  // namespace fastcnn::cuda
