// What the kernels with patches (conv2d_patch.cu, conv2d_patch_held.cu) know of a convolution.
#pragma once

#include "conv2d_patch_plan.h"
#include "conv2d_views.h"
#include "tensor_map.h"

namespace fastcnn::cuda {

struct PatchConvolution {
  TensorMap input, weight, residual, out;
  PatchPlan plan;
  FastDivisor by_column_tiles, by_tiles_w, by_tiles_h, by_patch_image, by_patch_w;
  int32_t filter_h, filter_w, channel_blocks;
  int32_t last_steps;  // products of 16 channels in the last block
  int32_t pad_top, pad_left;
  int32_t filters;               // of all groups
  FastDivisor by_group_filters;  // column -> group
  int32_t channels;              // of a group
  const float* scale;
  const float* bias;
  bool has_residual, relu;
};

inline PatchConvolution patch_operands(const ConvProblem& problem, DType dtype, const PatchPlan& plan,
                                       int columns_of_tile) {
  const ConvShape& shape = problem.shape;
  const int64_t columns = shape.by_row.divisor, rows = shape.by_image.divisor / columns;
  const int64_t filters = filters_of_all_groups(problem), taps = taps_of(shape);
  const auto view_of_output = [&](const void* data, int64_t pixel_stride) {
    return view_of(data, dtype, images_of(shape), rows, columns, filters, pixel_stride);
  };
  PatchConvolution convolution = {};
  convolution.plan = plan;
  convolution.filter_w = static_cast<int32_t>(shape.by_filter_w.divisor);
  convolution.filter_h = static_cast<int32_t>(taps / convolution.filter_w);
  convolution.channel_blocks = channel_blocks_of(shape);
  convolution.last_steps = last_steps_of(shape);
  convolution.input =
      image_map(input_of(problem, dtype), plan.patch_w, plan.tile_h + convolution.filter_h - 1, plan.tile_n);
  convolution.weight =
      filter_map(problem.weight, dtype, filters, taps, shape.channels, problem.weight_row_stride, columns_of_tile);
  convolution.out = image_map(view_of_output(problem.out, problem.out_stride), plan.tile_w, plan.tile_h, plan.tile_n);
  convolution.has_residual = problem.residual != nullptr;
  if (convolution.has_residual) {
    convolution.residual =
        image_map(view_of_output(problem.residual, problem.residual_stride), plan.tile_w, plan.tile_h, plan.tile_n);
  }
  convolution.by_column_tiles = FastDivisor(plan.column_tiles);
  convolution.by_tiles_w = FastDivisor(ceil_divide(columns, plan.tile_w));
  convolution.by_tiles_h = FastDivisor(ceil_divide(rows, plan.tile_h));
  convolution.by_patch_image = FastDivisor(static_cast<int64_t>(plan.patch_w) * plan.patch_h);
  convolution.by_patch_w = FastDivisor(plan.patch_w);
  convolution.pad_top = shape.pad_top;
  convolution.pad_left = shape.pad_left;
  convolution.filters = static_cast<int32_t>(filters);
  convolution.by_group_filters = FastDivisor(shape.filters);
  convolution.channels = shape.channels;
  convolution.scale = problem.scale;
  convolution.bias = problem.bias;
  convolution.relu = problem.relu;
  return convolution;
}

}  // namespace fastcnn::cuda
