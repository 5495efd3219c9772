// What conv2d.cpp needs of conv2d_bf16.cpp.
#pragma once

#include "isa/conv2d_bf16.h"
#include "kernels.h"
#include "preparation.h"

namespace fastcnn::cpu {

// A group's blocks of output channels, and the reduction values of a filter row in whole pairs.
inline int64_t bf16_column_blocks(int64_t group_out) {
  return ceil_div(group_out, kBf16ColumnBlock);
}
inline int64_t bf16_row_values(int64_t filter_w, int64_t group_in) {
  return ceil_div(filter_w * group_in, 2) * 2;
}

// Fills `packed`, which is zero: layouts in isa/conv2d_bf16.cpp and isa/conv2d_grouped_bf16.cpp. `weight` has the shape
// that `shape` says, and strides.
void pack_bf16_pairs(const PackedConv2dWeight& shape, const uint16_t* weight, const int64_t strides[4],
                     uint16_t* packed);

// conv2d_work() for weights in pairs.
Works conv2d_bf16_work(const TensorView& out, const TensorView& input, const PackedConv2dWeight& weight,
                       const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry, int threads);

}  // namespace fastcnn::cpu
