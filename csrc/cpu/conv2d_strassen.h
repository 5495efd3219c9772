// 1x1 convolution with stride 1 by Strassen's algorithm: see isa/conv2d_strassen.cpp.
#pragma once

#include <cstdint>

#include "../common/types.h"
#include "kernels.h"

namespace fastcnn::cpu {

// Why a weight and tensors of a dtype are not served; null where they are.
const char* conv2d_strassen_refusal(const PackedConv2dWeight& weight, DType dtype);

// Estimated cycles on two threads, to be compared with conv2d_cycles().
// pixels: of an image.
double conv2d_strassen_cycles(int64_t images, int64_t pixels, int64_t out_channels, int64_t in_channels);

}  // namespace fastcnn::cpu
