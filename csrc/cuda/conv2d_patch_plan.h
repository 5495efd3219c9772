// How conv2d_patch.cu cuts a convolution into tiles.
#pragma once

#include "conv2d_problem.h"
#include "device/portable.h"
#include "host.h"

namespace fastcnn::cuda {

constexpr int kPatchRows = 256;  // rows of a patch that a block multiplies

struct PatchPlan {
  int32_t tile_n = 0, tile_h = 0, tile_w = 0;  // output pixels of a tile; tile_n = 0: the kernel does not serve
  int32_t patch_h = 0, patch_w = 0;            // input pixels of an image that they need
  int32_t tiles = 0, column_tiles = 0;
  int32_t stages = 0;
  int32_t filter_bytes = 0;

  FASTCNN_HD int patch_pixels() const { return tile_n * patch_h * patch_w; }
  FASTCNN_HD int output_pixels() const { return tile_n * tile_h * tile_w; }
  FASTCNN_HD int patch_bytes() const { return (patch_pixels() * 128 + 1023) / 1024 * 1024; }
  FASTCNN_HD int output_bytes() const { return (output_pixels() * 128 + 1023) / 1024 * 1024; }
  int shared_bytes(int columns) const;
};

// The plan for tiles of 32 or 64 filters that multiplies the fewest rows; tile_n = 0 where there is none.
PatchPlan patch_plan(const ConvProblem& problem, int columns, const DeviceFacts& device);

// Whether conv2d_patch.cu serves the problem with tiles of this many filters: several taps, stride and dilation 1.
bool patch_fits(const ConvProblem& problem, DType dtype, int columns, const DeviceFacts& device);

}  // namespace fastcnn::cuda
