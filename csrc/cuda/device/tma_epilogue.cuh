// What the epilogues of the kernels with bulk copies share: pairs of results, and the factors of a tile's columns.
#pragma once

#include "numeric.cuh"

namespace fastcnn::cuda {

__device__ __forceinline__ float2 unpack(uint32_t bits, __nv_bfloat16) {
  __nv_bfloat16 pair[2];
  memcpy(pair, &bits, 4);
  return make_float2(to_float(pair[0]), to_float(pair[1]));
}
__device__ __forceinline__ float2 unpack(uint32_t bits, __half) {
  __half pair[2];
  memcpy(pair, &bits, 4);
  return make_float2(to_float(pair[0]), to_float(pair[1]));
}
template <typename T>
__device__ __forceinline__ uint32_t pack(float x, float y) {
  const T pair[2] = {from_float<T>(x), from_float<T>(y)};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

// A tile's scale and bias for each of its columns, from where the epilogue reads them for two columns at a time.
template <int kColumns, typename Problem>
__device__ __forceinline__ void stage_coefficients(const Problem& problem, float2* coefficients, int first_column,
                                                   int thread) {
  if (thread >= kColumns) return;
  const int column = first_column + thread;
  const bool real = column < problem.filters;
  coefficients[thread] = make_float2(real && problem.scale != nullptr ? problem.scale[column] : 1.0f,
                                     real && problem.bias != nullptr ? problem.bias[column] : 0.0f);
}

}  // namespace fastcnn::cuda
