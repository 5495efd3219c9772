// From a stem kernel's accumulators to memory: a lane holds eight neighbouring filters of every 32 (stem_layout.h), so
// they leave as 16-byte vectors without passing shared memory. acc[i] covers 16 pixels, of which this lane holds
// row[i][0] and row[i][1] (-1: not there); scales are the block's, followed by its biases.
#pragma once

#include "conv_epilogue.cuh"
#include "ptx.cuh"

namespace fastcnn::cuda {

// scale and bias of eight neighbouring filters, from shared memory.
struct Coefficients {
  float scale[8], bias[8];
  __device__ __forceinline__ Coefficients(const float* scales, const float* biases, int column) {
    eight(scale, scales + column);
    eight(bias, biases + column);
  }
  static __device__ __forceinline__ void eight(float (&x)[8], const float* from) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = reinterpret_cast<const float4*>(from)[i];
      x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
  }
};

// The usual end: no residual, all filters of the block there, 16-byte stores aligned.
template <typename T, int kAtoms, int kColumns, bool kRelu>
__device__ __forceinline__ void store_whole_pixels(const ConvProblem& problem, const float* scales,
                                                   const float (&acc)[kAtoms][kColumns / 8][4],
                                                   const int32_t (&row)[kAtoms][2], int first_filter, int lane) {
  T* out[kAtoms][2];
#pragma unroll
  for (int i = 0; i < 2 * kAtoms; ++i) {
    out[i / 2][i % 2] =
        static_cast<T*>(problem.out) + row[i / 2][i % 2] * problem.out_stride + first_filter + 8 * (lane % 4);
  }
#pragma unroll
  for (int group = 0; group < kColumns / 32; ++group) {
    Coefficients of(scales, scales + kColumns, 32 * group + 8 * (lane % 4));
#pragma unroll
    for (int i = 0; i < kAtoms; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* pair = &acc[i][4 * group + e][2 * half];
          words[e] = round_pair<T, kRelu>(pair[0] * of.scale[2 * e] + of.bias[2 * e],
                                          pair[1] * of.scale[2 * e + 1] + of.bias[2 * e + 1]);
        }
        if (row[i][half] >= 0) store_16(out[i][half] + 32 * group, make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }
}

// scale and bias, then residual, activation and store, of the eight filters a lane holds of every 32.
template <typename T, int kAtoms, int kColumns>
__device__ __forceinline__ void store_pixels(const ConvProblem& problem, const float* scales,
                                             const float (&acc)[kAtoms][kColumns / 8][4],
                                             const int32_t (&row)[kAtoms][2], int first_filter, int lane) {
#pragma unroll
  for (int group = 0; group < kColumns / 32; ++group) {
    const int column = 32 * group + 8 * (lane % 4);
    if (first_filter + column >= problem.shape.filters) continue;
    const Coefficients of(scales, scales + kColumns, column);
#pragma unroll
    for (int i = 0; i < kAtoms; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (row[i][half] < 0) continue;
        float y[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) y[e] = acc[i][4 * group + e / 2][2 * half + e % 2] * of.scale[e] + of.bias[e];
        finish_row<T>(problem, y, row[i][half], first_filter + column, first_filter + column);
      }
    }
  }
}

template <typename T, int kAtoms, int kColumns>
__device__ __forceinline__ void store_stem(const ConvProblem& problem, const float* scales,
                                           const float (&acc)[kAtoms][kColumns / 8][4], const int32_t (&row)[kAtoms][2],
                                           int first_filter, int lane) {
  const bool whole =
      problem.vector_output && problem.residual == nullptr && first_filter + kColumns <= problem.shape.filters;
  if (!whole) {
    store_pixels<T, kAtoms, kColumns>(problem, scales, acc, row, first_filter, lane);
  } else if (problem.relu) {
    store_whole_pixels<T, kAtoms, kColumns, true>(problem, scales, acc, row, first_filter, lane);
  } else {
    store_whole_pixels<T, kAtoms, kColumns, false>(problem, scales, acc, row, first_filter, lane);
  }
}

}  // namespace fastcnn::cuda
