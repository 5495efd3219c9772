// What the kernels with im2col copies (conv2d_tma.cu, conv2d_tma_split.cu) know of a convolution: where its operands
// come from, and the factors of its sums.
#pragma once

#include "conv2d_views.h"

namespace fastcnn::cuda {

struct TmaOperands {
  TensorMap input, weight;
  TensorMap input_rest, weight_rest;  // of blocks of 96 channels: rows of 32, for the channels behind the first 64
  FastDivisor by_column_tiles, by_image, by_row;
  int32_t tiles;
  int32_t filter_h, filter_w, channel_blocks;
  int32_t last_steps;  // products of 16 channels in a tap's last block
  int32_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int32_t filters;               // of all groups
  FastDivisor by_group_filters;  // column -> group
  int32_t channels;              // of a group
  const float* scale;
  const float* bias;
  const float* input_scale;
  const float* input_shift;
  bool relu, input_relu;
};

inline PixelMap pixels_of(const ConvProblem& problem, int tile_pixels) {
  const ConvShape& shape = problem.shape;
  PixelMap pixels = {};
  pixels.first_w = -shape.pad_left;
  pixels.first_h = -shape.pad_top;
  pixels.columns = shape.by_row.divisor;
  pixels.rows = shape.by_image.divisor / shape.by_row.divisor;
  pixels.stride_w = shape.stride_w;
  pixels.stride_h = shape.stride_h;
  pixels.tile_pixels = tile_pixels;
  return pixels;
}

// For tiles of `rows` pixels by `columns` filters, brought in blocks of `block` channels (64, 32 or 96).
inline void set_operands(TmaOperands& operands, const ConvProblem& problem, DType dtype, int rows, int columns,
                         int block) {
  const ConvShape& shape = problem.shape;
  const int64_t filters = filters_of_all_groups(problem);
  const int64_t taps = taps_of(shape), column_tiles = ceil_divide(filters, columns);
  const auto set_maps = [&](TensorMap& input, TensorMap& weight, int row) {
    PixelMap pixels = pixels_of(problem, rows);
    pixels.row = row;
    input = pixel_map(input_of(problem, dtype), pixels);
    weight = filter_map(problem.weight, dtype, filters, taps, shape.channels, problem.weight_row_stride, columns, row);
  };
  set_maps(operands.input, operands.weight, block == kTensorMapHalfRow ? kTensorMapHalfRow : kTensorMapRow);
  if (block == kTensorMapWideBlock) set_maps(operands.input_rest, operands.weight_rest, kTensorMapHalfRow);
  operands.by_column_tiles = FastDivisor(column_tiles);
  operands.by_image = shape.by_image;
  operands.by_row = shape.by_row;
  operands.tiles = static_cast<int32_t>(column_tiles * ceil_divide(shape.rows, rows));
  operands.filter_w = static_cast<int32_t>(shape.by_filter_w.divisor);
  operands.filter_h = static_cast<int32_t>(taps / operands.filter_w);
  operands.channel_blocks = static_cast<int32_t>(ceil_divide(shape.channels, block));
  operands.last_steps = static_cast<int32_t>(ceil_divide(shape.channels - (operands.channel_blocks - 1) * block, 16));
  operands.stride_h = shape.stride_h;
  operands.stride_w = shape.stride_w;
  operands.pad_top = shape.pad_top;
  operands.pad_left = shape.pad_left;
  operands.dilation_h = shape.dilation_h;
  operands.dilation_w = shape.dilation_w;
  operands.filters = static_cast<int32_t>(filters);
  operands.by_group_filters = FastDivisor(shape.filters);
  operands.channels = shape.channels;
  operands.scale = problem.scale;
  operands.bias = problem.bias;
  operands.relu = problem.relu;
  operands.input_scale = problem.input_scale;
  operands.input_shift = problem.input_shift;
  operands.input_relu = problem.input_relu;
}

}  // namespace fastcnn::cuda
