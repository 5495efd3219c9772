// Windows of pooling along one axis, as torch.nn.functional counts them.
#pragma once

#include <cstdint>

#include "fast_divide.h"
#include "portable.h"

namespace fastcnn::cuda {

struct PoolAxis {
  int32_t size = 0;     // of the input
  int32_t outputs = 0;  // of the output
  int32_t kernel = 1, stride = 1, pad_start = 0, pad_end = 0, dilation = 1;
  bool adaptive = false;   // window i is floor(i * size / outputs) .. ceil((i + 1) * size / outputs);
  FastDivisor by_outputs;  // (outputs + 1) * (size + 1) must stay below 2^31
};

struct PoolWindow {
  int32_t begin, end;  // real input positions begin, begin + dilation, ... below end
  int32_t padded;      // positions counted with padding
};

FASTCNN_HD int32_t smaller(int32_t a, int32_t b) {
  return a < b ? a : b;
}

FASTCNN_HD PoolWindow pool_window(const PoolAxis& axis, int32_t output) {
  if (axis.adaptive) {
    const int32_t begin = axis.by_outputs.quotient(output * axis.size);
    const int32_t end = axis.by_outputs.quotient((output + 1) * axis.size + axis.outputs - 1);
    return {begin, end, end - begin};
  }
  int32_t begin = output * axis.stride - axis.pad_start;
  const int32_t reach = (axis.kernel - 1) * axis.dilation + 1;
  const int32_t padded_end = smaller(begin + reach, axis.size + axis.pad_end);
  const int32_t padded = padded_end - begin;
  // The first real position of a dilated window lies a whole number of dilations after its start.
  while (begin < 0) begin += axis.dilation;
  return {begin, smaller(padded_end, axis.size), padded};
}

}  // namespace fastcnn::cuda
