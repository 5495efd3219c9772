// Descriptors that tell the bulk copy engine (TMA) how a tensor lies in memory. Made on the host for each launch and
// passed to the kernel by value, so a CUDA graph keeps its own copy.
//
// Copies bring rows of up to 64 values of 2 bytes into 128 bytes of shared memory, in the 128B swizzle of
// device/tile_layout.h, or where `row` says so rows of up to 32 values into 64 bytes, in the 64B swizzle. Values
// outside the tensor arrive as zero.
#pragma once

#include <cstdint>

#include "../common/types.h"

namespace fastcnn::cuda {

constexpr int kTensorMapRow = 64;                                       // values in a row of shared memory
constexpr int kTensorMapHalfRow = 32;                                   // the same, in the 64B swizzle
constexpr int kTensorMapWideBlock = kTensorMapRow + kTensorMapHalfRow;  // channels that two copies bring

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// The pixels that a convolution reads for its output pixels, before a filter tap shifts them.
struct PixelMap {
  int64_t first_w, first_h;    // where the first output pixel's window starts: minus the padding
  int64_t columns, rows;       // Q, P
  int64_t stride_w, stride_h;  // 1 .. 8
  int tile_pixels;             // pixels of a copy, at most 256
  int row = kTensorMapRow;     // channels of a copy
};

// Whether the copy engine can walk these pixels (its corners are 8-bit, its strides at most 8).
bool pixel_map_fits(const TensorView& image, const PixelMap& pixels);
TensorMap pixel_map(const TensorView& image, const PixelMap& pixels);

// (K, R * S, C) filters, `row_stride` values apart; a copy brings `row` channels of one tap of `tile_filters` filters.
TensorMap filter_map(const void* weight, DType dtype, int64_t filters, int64_t taps, int64_t channels,
                     int64_t row_stride, int tile_filters, int row = kTensorMapRow);

// A copy moves 64 channels of a box of pixels: `box_w` by `box_h` of each of `box_n` images. Pixels outside the image
// arrive as zero, and are not written.
TensorMap image_map(const TensorView& view, int box_w, int box_h, int box_n);

// The view's pixels as rows of its channels; a copy moves 64 channels of `tile_pixels` pixels. `in_pairs`: the next 64
// channels follow soon, so that L2 fetches both at once, where they are a line of 256 bytes.
TensorMap matrix_map(const TensorView& view, int tile_pixels, bool in_pairs = false);

}  // namespace fastcnn::cuda
