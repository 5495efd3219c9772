// Layer normalisation and softmax, used by plans (plan.h); the arithmetic is in isa/rows.cpp.
#pragma once

#include "../common/types.h"
#include "work.h"

namespace fastcnn::cpu {

// Matrices are views with n rows, h = w = 1, c columns and pixel_stride as their row stride. weight and bias have c
// values or are null.
Works layer_norm_work(const TensorView& out, const TensorView& input, const float* weight, const float* bias, float eps,
                      int threads);
Works softmax_work(const TensorView& out, const TensorView& input, int threads);

}  // namespace fastcnn::cpu
