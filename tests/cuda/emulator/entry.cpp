// C entry points over the emulated kernels, for ctypes. Each returns null or an error message.
#include <exception>
#include <string>

#include "device/conv_index.h"
#include "emulator.h"
#include "kernels.h"

namespace {

std::string message;

template <typename Call>
const char* guarded(const Call& call) {
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

using namespace fastcnn;

}  // namespace

extern "C" {

void emulated_eager(int on) {
  emulator::eager = on != 0;
}

const char* emulated_conv2d(const TensorView* out, const TensorView* input, const void* weight,
                            const Prologue* prologue, const Epilogue* epilogue, const Conv2dGeometry* geometry,
                            int allow_tf32, int device, const char* kernel) {
  return guarded([&] {
    cuda::conv2d(*out, *input, weight, *prologue, *epilogue, *geometry, allow_tf32 != 0, device, nullptr, kernel);
  });
}

const char* emulated_conv2d_max_pool2d(const TensorView* out, const TensorView* input, const void* weight,
                                       const Epilogue* epilogue, const Conv2dGeometry* geometry, int64_t conv_h,
                                       int64_t conv_w, const Pool2dGeometry* pooling, int device) {
  return guarded([&] {
    cuda::conv2d_max_pool2d(*out, *input, weight, *epilogue, *geometry, conv_h, conv_w, *pooling, device, nullptr);
  });
}

// The names of the kernels that can serve the case, separated by commas.
const char* emulated_conv2d_names(const TensorView* out, const TensorView* input, const void* weight,
                                  const Prologue* prologue, const Epilogue* epilogue, const Conv2dGeometry* geometry,
                                  int allow_tf32, int device) {
  message.clear();
  for (const std::string& name :
       cuda::conv2d_kernel_names(*out, *input, weight, *prologue, *epilogue, *geometry, allow_tf32 != 0, device)) {
    message += (message.empty() ? "" : ",") + name;
  }
  return message.c_str();
}

const char* emulated_conv2d_1x1_pair(const cuda::Conv1x1Pair* pair, int device) {
  return guarded([&] { cuda::conv2d_1x1_pair(*pair, device, nullptr); });
}

// Empty where the kernel can serve the pair.
const char* emulated_conv2d_1x1_pair_unsupported(const cuda::Conv1x1Pair* pair, int device) {
  message = cuda::conv2d_1x1_pair_unsupported(*pair, device);
  return message.c_str();
}

const char* emulated_conv2d_1x1_pair_weights(int64_t channels, int64_t wide, int64_t narrow, int device) {
  message = cuda::conv2d_1x1_pair_weights(channels, wide, narrow, device);
  return message.c_str();
}

const char* emulated_linear(const TensorView* out, const TensorView* input, const TensorView* weight, const float* bias,
                            int relu, int allow_tf32, int device) {
  return guarded([&] {
    cuda::linear(*out, *input, *weight, bias, static_cast<Activation>(relu), allow_tf32 != 0, device, nullptr);
  });
}

const char* emulated_channel_affine(const TensorView* out, const TensorView* input, const float* scale,
                                    const float* shift, const float* centre, const TensorView* residual, int relu,
                                    int device) {
  return guarded([&] {
    cuda::channel_affine(*out, *input, scale, shift, centre, *residual, static_cast<Activation>(relu), device, nullptr);
  });
}

const char* emulated_residual_add(const TensorView* out, const TensorView* input, const TensorView* residual,
                                  float scale, int relu, int device) {
  return guarded(
      [&] { cuda::residual_add(*out, *input, *residual, scale, static_cast<Activation>(relu), device, nullptr); });
}

size_t emulated_batch_statistics_bytes(const TensorView* input) {
  return cuda::batch_statistics_workspace_bytes(*input);
}

const char* emulated_batch_statistics(float* mean, float* variance, const TensorView* input, float* workspace,
                                      int device) {
  return guarded([&] { cuda::batch_statistics(mean, variance, *input, workspace, device, nullptr); });
}

const char* emulated_max_pool2d(const TensorView* out, const TensorView* input, const Pool2dGeometry* geometry,
                                int device) {
  return guarded([&] { cuda::max_pool2d(*out, *input, *geometry, device, nullptr); });
}

const char* emulated_avg_pool2d(const TensorView* out, const TensorView* input, const Pool2dGeometry* geometry,
                                int64_t pad_bottom, int64_t pad_right, int count_include_pad, int64_t divisor,
                                int device) {
  return guarded([&] {
    cuda::avg_pool2d(*out, *input, *geometry, pad_bottom, pad_right, count_include_pad != 0, divisor, device, nullptr);
  });
}

const char* emulated_adaptive_avg_pool2d(const TensorView* out, const TensorView* input, int device) {
  return guarded([&] { cuda::adaptive_avg_pool2d(*out, *input, device, nullptr); });
}

const char* emulated_local_response_norm(const TensorView* out, const TensorView* input, int64_t size, float alpha,
                                         float beta, float k, int device) {
  return guarded([&] { cuda::local_response_norm(*out, *input, size, alpha, beta, k, device, nullptr); });
}

// The first n >= 0 where the fast quotient or remainder by d differs from the machine's, or -1. Tries the multiples of
// d and their neighbours up to 2^31, spread evenly, and both ends of the range.
int64_t emulated_fast_divide_error(int64_t d, int64_t tries) {
  const cuda::FastDivisor fast(d);
  const int64_t last = 0x7fffffff, multiples = last / d;
  for (int64_t i = 0; i <= tries; ++i) {
    const int64_t multiple = static_cast<int64_t>(static_cast<double>(multiples) * i / tries) * d;
    for (const int64_t n : {multiple - 1, multiple, multiple + 1, i, last - i}) {
      if (n < 0 || n > last) continue;
      int32_t remainder;
      const int32_t quotient = fast.divide(static_cast<int32_t>(n), remainder);
      if (quotient != n / d || remainder != n % d) return n;
    }
  }
  return -1;
}

// Where row `row`, column `column` of im2col reads, in elements from the input's start; -1 for padding.
int64_t emulated_gather(const TensorView* input, const Conv2dGeometry* geometry, int64_t p, int64_t q, int64_t row,
                        int64_t column) {
  cuda::ConvShape shape;
  const int64_t channels = input->c / geometry->groups;
  shape.rows = static_cast<int32_t>(input->n * p * q);
  shape.reduction = static_cast<int32_t>(geometry->filter_h * geometry->filter_w * channels);
  shape.channels = static_cast<int32_t>(channels);
  shape.height = static_cast<int32_t>(input->h);
  shape.width = static_cast<int32_t>(input->w);
  shape.stride_h = static_cast<int32_t>(geometry->stride_h);
  shape.stride_w = static_cast<int32_t>(geometry->stride_w);
  shape.pad_top = static_cast<int32_t>(geometry->pad_top);
  shape.pad_left = static_cast<int32_t>(geometry->pad_left);
  shape.dilation_h = static_cast<int32_t>(geometry->dilation_h);
  shape.dilation_w = static_cast<int32_t>(geometry->dilation_w);
  shape.pixel_stride = input->pixel_stride;
  shape.by_image = cuda::FastDivisor(p * q);
  shape.by_row = cuda::FastDivisor(q);
  shape.by_channels = cuda::FastDivisor(channels);
  shape.by_filter_w = cuda::FastDivisor(geometry->filter_w);
  const cuda::PixelOrigin origin = cuda::pixel_origin(shape, static_cast<int32_t>(row));
  const cuda::FilterTap tap = cuda::filter_tap(shape, static_cast<int32_t>(column));
  return cuda::inside_image(shape, origin, tap) ? origin.offset + tap.offset : -1;
}

}  // extern "C"
