// What several operators do before their kernels run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../common/types.h"
#include "parallel.h"

namespace fastcnn::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Value `index` of fp32 or bf16 memory.
inline float read_as_float(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[index];
  const uint32_t word = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// A convolution's epilogue vectors with each group's `group_out` values padded to `padded` ones (whole column blocks),
// so that the kernel reads them without a test: `scale` first (1 where there is none), `bias` after it (0).
struct EpilogueVectors {
  EpilogueVectors(const Epilogue& epilogue, int64_t groups, int64_t group_out, int64_t padded)
      : memory(static_cast<float*>(allocate_aligned(2 * groups * padded * 4)), std::free),
        scale(memory.get()),
        bias(scale + groups * padded) {
    std::fill(scale, bias, 1.0f);
    std::fill(bias, bias + groups * padded, 0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      if (epilogue.scale != nullptr) std::copy_n(epilogue.scale + g * group_out, group_out, scale + g * padded);
      if (epilogue.bias != nullptr) std::copy_n(epilogue.bias + g * group_out, group_out, bias + g * padded);
    }
  }

  std::shared_ptr<float> memory;
  float* scale;
  float* bias;
};

// What every kernel's description of a convolution holds of its operands. `vectors` must outlive the problem.
template <typename Problem>
void set_operands(Problem& problem, const TensorView& out, const TensorView& input, const Prologue& prologue,
                  const Epilogue& epilogue, const EpilogueVectors& vectors) {
  problem.out = out;
  problem.input = input;
  problem.input_scale = prologue.scale;
  problem.input_shift = prologue.shift;
  problem.input_relu = prologue.relu;
  problem.scale = vectors.scale;
  problem.bias = vectors.bias;
  problem.residual = epilogue.residual;
  problem.relu = epilogue.activation == Activation::relu;
}

}  // namespace fastcnn::cpu
