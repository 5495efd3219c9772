// Plain structs that cross the boundary between bindings.cpp and the kernels, shared by cpu/ and cuda/.
// No torch, no Python: pointers, sizes and strides only. Every size and stride counts elements, not bytes.
#pragma once

#include <cstdint>

namespace fastcnn {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int64_t size_in_bytes(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

enum class Activation : int32_t { none = 0, relu = 1 };

// A 4-D activation tensor in channels-last memory. Pixel (n, h, w) starts at
//   data + ((n * H + h) * W + w) * pixel_stride
// and its `c` channels are adjacent. pixel_stride > c describes a channel slice of a wider tensor: that is how a
// branch writes its part of a concatenation, and how a dense layer reads a prefix of a growing buffer.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t n = 0, h = 0, w = 0, c = 0;
  int64_t pixel_stride = 0;

  int64_t pixels() const { return n * h * w; }
  explicit operator bool() const { return data != nullptr; }
};

// Filter geometry. Padding after the last row and column needs no field: output sizes P, Q come with the output
// view, and whatever a filter reaches beyond the input reads as zero.
struct Conv2dGeometry {
  int64_t filter_h = 1, filter_w = 1;  // R, S
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_left = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t groups = 1;
};

// Applied to each input value as it is read: x -> relu?(x * scale[c] + shift[c]). Null pointers mean identity.
// Padding is added after the prologue, so padded positions stay zero (pre-activation BN + ReLU, then convolution).
struct Prologue {
  const float* scale = nullptr;
  const float* shift = nullptr;
  bool relu = false;

  bool identity() const { return scale == nullptr && shift == nullptr && !relu; }
};

// Applied to each accumulator before it is stored: y = act(acc * scale[k] + bias[k] + residual).
// Null pointers mean 1, 0 and 0. `residual` has the output's shape and dtype, with its own pixel stride.
struct Epilogue {
  const float* scale = nullptr;
  const float* bias = nullptr;
  TensorView residual;
  Activation activation = Activation::none;
};

struct Pool2dGeometry {
  int64_t kernel_h = 1, kernel_w = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_left = 0;
  int64_t dilation_h = 1, dilation_w = 1;  // max pooling only
};

}  // namespace fastcnn
