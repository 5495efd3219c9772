// How conv2d_patch.cu and conv2d_patch_held.cu cut a convolution into tiles.
#pragma once

#include "conv2d_problem.h"
#include "device/portable.h"
#include "host.h"

namespace fastcnn::cuda {

constexpr int kPatchRows = 256;  // rows of a patch that a block multiplies
constexpr int kMostPatchStages = 4;
constexpr int kHeldPatchColumns = 64, kHeldPatchTaps = 9;
constexpr int kHeldPatchBarrierBytes = 32 + kMostPatchStages * 16;

struct PatchPlan {
  int32_t tile_n = 0, tile_h = 0, tile_w = 0;  // output pixels of a tile; tile_n = 0: the kernel does not serve
  int32_t patch_h = 0, patch_w = 0;            // input pixels of an image that they need
  int32_t tiles = 0, column_tiles = 0;
  int32_t stages = 0;
  int32_t filter_bytes = 0;
  bool held = false;  // for conv2d_patch_held.cu, where the last stage first holds the filters

  FASTCNN_HD int patch_pixels() const { return tile_n * patch_h * patch_w; }
  FASTCNN_HD int output_pixels() const { return tile_n * tile_h * tile_w; }
  FASTCNN_HD int patch_bytes() const { return (patch_pixels() * 128 + 1023) / 1024 * 1024; }
  FASTCNN_HD int output_bytes() const { return (output_pixels() * 128 + 1023) / 1024 * 1024; }
  FASTCNN_HD int first_bytes() const {  // of what lies before the patches
    return !held || filter_bytes > patch_bytes() ? filter_bytes : patch_bytes();
  }
  int shared_bytes(int columns) const;
};

// The plan for tiles of 32 or 64 filters that multiplies the fewest rows, and of such the one with the smallest patch;
// tile_n = 0 where there is none. `held`: with the filters in registers.
PatchPlan patch_plan(const ConvProblem& problem, int columns, const DeviceFacts& device, bool held = false);

// Whether conv2d_patch.cu serves the problem with tiles of this many filters: several taps, stride and dilation 1.
bool patch_fits(const ConvProblem& problem, DType dtype, int columns, const DeviceFacts& device);

// Whether conv2d_patch_held.cu does: 3x3 filters over at most 64 channels.
bool held_patch_fits(const ConvProblem& problem, DType dtype, const DeviceFacts& device);

}  // namespace fastcnn::cuda
