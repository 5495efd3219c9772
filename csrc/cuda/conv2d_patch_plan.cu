// See conv2d_patch_plan.h.
#include <algorithm>

#include "conv2d_patch_plan.h"
#include "conv2d_views.h"

namespace fastcnn::cuda {

namespace {

// Rows of the patch up to the last one that is an output pixel.
int64_t rows_to_multiply(const PatchPlan& plan) {
  return ((static_cast<int64_t>(plan.tile_n) - 1) * plan.patch_h + plan.tile_h - 1) * plan.patch_w + plan.tile_w;
}

}  // namespace

// The last rows of a patch are multiplied together with what lies behind them, which is the output tile or more.
int PatchPlan::shared_bytes(int columns) const {
  const int after_patches = held ? 2 * output_bytes() + kHeldPatchBarrierBytes + 16
                                 : output_bytes() + columns * 8 + 16 + kMostPatchStages * 16;
  const int read_beyond =  // from a patch's start
      (kPatchRows + (patch_h - tile_h) * patch_w + patch_w - tile_w) * 128;
  const int patches = held ? stages - 1 : stages;
  return 1024 + first_bytes() + patches * patch_bytes() + std::max(after_patches, read_beyond - patch_bytes());
}

namespace {

bool taps_share_patches(const ConvProblem& problem, DType dtype) {
  const ConvShape& shape = problem.shape;
  return tma_fits(problem, dtype) && !problem.has_prologue() && shape.reduction > shape.channels &&
         shape.stride_h == 1 && shape.stride_w == 1 && shape.dilation_h == 1 && shape.dilation_w == 1;
}

}  // namespace

bool patch_fits(const ConvProblem& problem, DType dtype, int columns, const DeviceFacts& device) {
  const int64_t filters = filters_of_all_groups(problem);
  return taps_share_patches(problem, dtype) && (columns == 64 ? filters > 32 : filters <= 32) &&
         patch_plan(problem, columns, device).tile_n != 0;
}

bool held_patch_fits(const ConvProblem& problem, DType dtype, const DeviceFacts& device) {
  return taps_share_patches(problem, dtype) && taps_of(problem.shape) == kHeldPatchTaps &&
         problem.shape.by_filter_w.divisor == 3 && channel_blocks_of(problem.shape) == 1 &&
         filters_of_all_groups(problem) > 32 && patch_plan(problem, kHeldPatchColumns, device, true).tile_n != 0;
}

PatchPlan patch_plan(const ConvProblem& problem, int columns, const DeviceFacts& device, bool held) {
  const ConvShape& shape = problem.shape;
  const int64_t taps = taps_of(shape), filter_w = shape.by_filter_w.divisor;
  const int64_t filter_h = taps / filter_w;
  const int64_t width = shape.by_row.divisor, height = shape.by_image.divisor / width;
  const int64_t images = images_of(shape);
  const int64_t blocks = channel_blocks_of(shape);
  const int64_t filters = filters_of_all_groups(problem);
  PatchPlan best;
  if (taps * blocks * columns * 128 > device.shared_bytes) return best;
  int64_t fewest = 0;
  for (int64_t parts = 1; parts <= 16 && parts <= width; ++parts) {
    PatchPlan plan;
    plan.held = held;
    plan.filter_bytes = static_cast<int32_t>(taps * blocks * columns * 128);
    plan.column_tiles = static_cast<int32_t>(ceil_divide(filters, columns));
    plan.tile_n = 1;
    plan.tile_w = static_cast<int32_t>(ceil_divide(width, parts));
    plan.patch_w = static_cast<int32_t>(plan.tile_w + filter_w - 1);
    if (plan.patch_w > 256) continue;
    plan.tile_h = static_cast<int32_t>(std::min<int64_t>(height, (kPatchRows - plan.tile_w) / plan.patch_w + 1));
    if (plan.tile_w > kPatchRows || plan.tile_h < 1) continue;
    // Rows of equal height, where as many tiles then do.
    plan.tile_h = static_cast<int32_t>(ceil_divide(height, ceil_divide(height, plan.tile_h)));
    plan.patch_h = static_cast<int32_t>(plan.tile_h + filter_h - 1);
    if (plan.patch_h > 256) continue;
    while (parts == 1 && plan.tile_h == height && plan.tile_n < std::min<int64_t>(images, 256)) {
      ++plan.tile_n;
      if (rows_to_multiply(plan) <= kPatchRows) continue;
      --plan.tile_n;
      break;
    }
    for (plan.stages = kMostPatchStages; plan.stages >= 2; --plan.stages) {
      if (plan.shared_bytes(columns) <= device.shared_bytes) break;
    }
    if (plan.stages < 2) continue;
    const int64_t tiles =
        ceil_divide(images, plan.tile_n) * ceil_divide(height, plan.tile_h) * ceil_divide(width, plan.tile_w);
    const bool better =
        best.tile_n == 0 || tiles < fewest || (tiles == fewest && plan.patch_pixels() < best.patch_pixels());
    if (tiles >= kRowLimit || !better) continue;
    plan.tiles = static_cast<int32_t>(tiles);
    fewest = tiles;
    best = plan;
  }
  return best;
}

}  // namespace fastcnn::cuda
