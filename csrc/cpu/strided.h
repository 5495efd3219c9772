// Element-wise work on tensors of any strides: layout conversions, padding, and the element-wise operators and
// reductions of networks that are not fastcnn operators. Used by plans (plan.h).
#pragma once

#include <cstdint>
#include <vector>

#include "../common/types.h"
#include "isa/table.h"
#include "work.h"

namespace fastcnn::cpu {

// A tensor of any rank; strides in elements, 0 where a dimension is broadcast.
struct Strided {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::vector<int64_t> shape, strides;
};

Works copy_work(const Strided& out, const Strided& input, int threads);  // converts between fp32 and bf16
Works fill_work(const Strided& out, float value, int threads);
// out = map(a) or map(a, b), b without data for functions of one value. All have out's shape; arithmetic in fp32, one
// rounding to the storage.
Works map_work(Map map, float alpha, float beta, const Strided& out, const Strided& a, const Strided& b, int threads);

enum class Reduction : int32_t { sum, max };

// out[...] = factor * (sum, accumulated in double, or maximum of input[..., :]). input has one dimension more than out.
Works reduce_last_work(Reduction reduction, const Strided& out, const Strided& input, float factor, int threads);

}  // namespace fastcnn::cpu
