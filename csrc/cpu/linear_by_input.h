// A fully connected layer with one input row and short weights by input value: its cut into tasks.
#pragma once

#include "linear_short.h"

namespace fastcnn::cpu {

Works linear_by_input_work(const TensorView& out, const TensorView& input, const ShortLinearWeight& weight,
                           const float* bias, Activation activation, int threads);

}  // namespace fastcnn::cpu
