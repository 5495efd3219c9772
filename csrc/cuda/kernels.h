// Entry points of the CUDA kernels: one function per operator of the kernel contract (docs/internals.md).
//
// This header needs no CUDA header. Every pointer inside a TensorView, Prologue or Epilogue, and every `weight`, is a
// device pointer on device `device`; `stream` is a cudaStream_t. Functions only enqueue work: no allocation, no
// synchronisation, so each may be captured in a CUDA graph. Arguments are checked by the caller (shapes, dtypes,
// devices); what the kernels themselves cannot serve throws std::invalid_argument, a failing CUDA call throws
// std::runtime_error with the kernel's name and the CUDA error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../common/types.h"

namespace fastcnn::cuda {

// out = act(conv(pro(input), weight) * scale[k] + bias[k] + residual).
// weight is (K, R, S, C/groups), contiguous, in the input's dtype. fp32 inputs are multiplied exactly unless
// allow_tf32. `kernel` is one of conv2d_kernel_names for the same arguments; empty: the first of them.
void conv2d(const TensorView& out, const TensorView& input, const void* weight_krsc, const Prologue& prologue,
            const Epilogue& epilogue, const Conv2dGeometry& geometry, bool allow_tf32, int device, void* stream,
            const std::string& kernel = "");

// out = max_pool2d(act(conv(input, weight) * scale[k] + bias[k])) in one kernel, to the bit the result of the two
// (sm_90a; bf16, fp16). conv_h, conv_w: the convolution's output size. For what conv2d's kernel "stem wgmma" serves,
// and 3x3 windows with stride 2 and padding 0 or 1.
void conv2d_max_pool2d(const TensorView& out, const TensorView& input, const void* weight_krsc,
                       const Epilogue& epilogue, const Conv2dGeometry& geometry, int64_t conv_h, int64_t conv_w,
                       const Pool2dGeometry& pooling, int device, void* stream);

// The kernels that can serve conv2d, e.g. "wgmma 128x128", the one that it launches by itself first. Launches nothing.
std::vector<std::string> conv2d_kernel_names(const TensorView& out, const TensorView& input, const void* weight_krsc,
                                             const Prologue& prologue, const Epilogue& epilogue,
                                             const Conv2dGeometry& geometry, bool allow_tf32, int device);

// Two 1x1 convolutions, the second of the first one's result:
//   wide = relu(conv(input, expand) * expand_scale + expand_bias + residual)
//   narrow = relu(conv(wide, reduce) * reduce_scale + reduce_bias)
// Weights are (J, C) and (K, J), contiguous, in the input's dtype (bf16, fp16); vectors fp32 or null.
struct Conv1x1Pair {
  TensorView wide, narrow, input, residual;
  const void* expand_weight = nullptr;
  const void* reduce_weight = nullptr;
  const float* expand_scale = nullptr;
  const float* expand_bias = nullptr;
  const float* reduce_scale = nullptr;
  const float* reduce_bias = nullptr;
};
void conv2d_1x1_pair(const Conv1x1Pair& pair, int device, void* stream);
// Why the kernel cannot serve it; empty when it can. Launches nothing.
std::string conv2d_1x1_pair_unsupported(const Conv1x1Pair& pair, int device);
// Where it has the weights for so many channels of input, wide and narrow: "resident" in shared memory, "streamed" from
// L2, or "" where it cannot serve them.
std::string conv2d_1x1_pair_weights(int64_t channels, int64_t wide_channels, int64_t narrow_channels, int device);

// out = act(input @ weight.T + bias). A matrix is a view with n rows, h = w = 1, c columns and pixel_stride as its row
// stride: out (M, K), input (M, C), weight (K, C). bias (K,) fp32 or null.
void linear(const TensorView& out, const TensorView& input, const TensorView& weight, const float* bias,
            Activation activation, bool allow_tf32, int device, void* stream);

// out = act((input - centre[c]) * scale[c] + shift[c] + residual). scale, shift, centre (C,) fp32 or null; residual may
// be an empty view. out may be exactly input or residual.
void channel_affine(const TensorView& out, const TensorView& input, const float* scale, const float* shift,
                    const float* centre, const TensorView& residual, Activation activation, int device, void* stream);

// out = act(input * scale + residual). out may be exactly input or residual.
void residual_add(const TensorView& out, const TensorView& input, const TensorView& residual, float scale,
                  Activation activation, int device, void* stream);

// Per-channel mean and biased variance over N, H, W. `workspace` is device memory of the size given below; its contents
// before and after mean nothing. The result does not depend on the device and repeats bit for bit.
size_t batch_statistics_workspace_bytes(const TensorView& input);
void batch_statistics(float* mean, float* variance, const TensorView& input, float* workspace, int device,
                      void* stream);

void max_pool2d(const TensorView& out, const TensorView& input, const Pool2dGeometry& geometry, int device,
                void* stream);

// divisor 0: the window's size, counted with or without padding. pad_bottom, pad_right bound the counted window.
void avg_pool2d(const TensorView& out, const TensorView& input, const Pool2dGeometry& geometry, int64_t pad_bottom,
                int64_t pad_right, bool count_include_pad, int64_t divisor, int device, void* stream);

// Window i of P over H: floor(i*H/P) .. ceil((i+1)*H/P).
void adaptive_avg_pool2d(const TensorView& out, const TensorView& input, int device, void* stream);

// out = input / (k + alpha / size * sum of squares over `size` channels centred on c) ** beta.
void local_response_norm(const TensorView& out, const TensorView& input, int64_t size, float alpha, float beta, float k,
                         int device, void* stream);

// GPUs the driver reports; 0 when there is no driver or no GPU. Never throws.
int device_count();

struct DeviceInfo {
  std::string name;
  int compute_major = 0, compute_minor = 0;
  int multiprocessors = 0;
  int64_t memory_bytes = 0, l2_bytes = 0, shared_bytes_per_block = 0;
  bool supported = false;  // this build holds machine code that the device can run
};
DeviceInfo device_info(int device);

// The architectures this build was compiled for, e.g. {"80", "90a"}.
std::vector<std::string> compiled_architectures();

// early_starts() of host.h for this thread; returns what it was.
bool set_early_starts(bool on);

// cudart's version as major * 1000 + minor * 10, and the driver's (0 when there is none).
int runtime_version();
int driver_version();

}  // namespace fastcnn::cuda
