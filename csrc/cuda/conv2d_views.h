// A convolution's tensors and sizes as the launchers of the kernels with bulk copies need them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "conv2d_problem.h"
#include "host.h"
#include "tensor_map.h"

namespace fastcnn::cuda {

template <typename T>
constexpr DType kTypeOf16Bits = DType::bf16;
template <>
constexpr DType kTypeOf16Bits<__half> = DType::f16;

inline int64_t taps_of(const ConvShape& shape) {
  return shape.reduction / shape.channels;
}

inline int64_t images_of(const ConvShape& shape) {
  return shape.rows / shape.by_image.divisor;
}

inline int64_t filters_of_all_groups(const ConvProblem& problem) {
  return static_cast<int64_t>(problem.shape.filters) * problem.groups;
}

// Blocks of 64 channels of a group, and products of 16 channels in the last of them.
inline int32_t channel_blocks_of(const ConvShape& shape) {
  return static_cast<int32_t>(ceil_divide(shape.channels, kTensorMapRow));
}
inline int32_t last_steps_of(const ConvShape& shape) {
  return static_cast<int32_t>(ceil_divide(shape.channels - (channel_blocks_of(shape) - 1) * kTensorMapRow, 16));
}

inline TensorView view_of(const void* data, DType dtype, int64_t n, int64_t h, int64_t w, int64_t c,
                          int64_t pixel_stride) {
  TensorView view;
  view.data = const_cast<void*>(data);
  view.dtype = dtype;
  view.n = n;
  view.h = h;
  view.w = w;
  view.c = c;
  view.pixel_stride = pixel_stride;
  return view;
}

inline TensorView input_of(const ConvProblem& problem, DType dtype) {
  const ConvShape& shape = problem.shape;
  return view_of(problem.input, dtype, images_of(shape), shape.height, shape.width,
                 static_cast<int64_t>(shape.channels) * problem.groups, shape.pixel_stride);
}

}  // namespace fastcnn::cuda
