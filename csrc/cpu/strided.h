// Element-wise work on tensors of any strides: layout conversions, padding, and the few element-wise operators of
// networks that are not fastcnn operators. Used by plans (plan.h); nothing here is where a network's time should go.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/types.h"
#include "work.h"

namespace fastcnn::cpu {

// A tensor of any rank; strides in elements, 0 where a dimension is broadcast.
struct Strided {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::vector<int64_t> shape, strides;
};

enum class Map : int32_t { add, subtract, multiply, tanh, negate, square };

Works copy_work(const Strided& out, const Strided& input, int threads);  // converts between fp32 and bf16
Works fill_work(const Strided& out, float value, int threads);
// out = a op b, or op(a) (b without data). All have out's shape; arithmetic in fp32, one rounding to the storage.
Works map_work(Map map, const Strided& out, const Strided& a, const Strided& b, int threads);
// out[...] = sum of input[..., :], accumulated in double. input has one dimension more than out.
Works sum_last_work(const Strided& out, const Strided& input, int threads);

}  // namespace fastcnn::cpu
