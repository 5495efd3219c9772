// From accumulators to memory: y = act(acc * scale[k] + bias[k] + residual), in fp32, rounded once.
//
// A tensor-core accumulator gives each lane two neighbouring columns of scattered rows, which would store 4 bytes at a
// time. So each warp lays 16 rows by 32 columns down in its own slab of shared memory and picks them up again with 16
// bytes of one row per lane: stores then cover whole 32-byte sectors, and the residual is read the same way.
#pragma once

#include "../conv2d_problem.h"
#include "numeric.cuh"
#include "tile_layout.h"

namespace fastcnn::cuda {

// The end of a row: residual, activation, and the store of kVector<T> neighbouring filters from `column` of the group
// (`channel` of the layer) on. y holds what scale and bias have left.
template <typename T>
__device__ __forceinline__ void finish_row(const ConvProblem& problem, float (&y)[kVector<T>], int row, int column,
                                           int64_t channel) {
  constexpr int kWidth = kVector<T>;
  T* out = static_cast<T*>(problem.out) + static_cast<int64_t>(row) * problem.out_stride + channel;
  const T* residual = problem.residual == nullptr ? nullptr
                                                  : static_cast<const T*>(problem.residual) +
                                                        static_cast<int64_t>(row) * problem.residual_stride + channel;
  if (problem.vector_output && column + kWidth <= problem.shape.filters) {
    if (residual != nullptr) {
      float x[kWidth];
      load<kWidth>(x, residual);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) y[i] += x[i];
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) y[i] = problem.relu ? relu(y[i]) : y[i];
    store<kWidth>(out, y);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (column + i >= problem.shape.filters) continue;
      if (residual != nullptr) y[i] += to_float(residual[i]);
      out[i] = from_float<T>(problem.relu ? relu(y[i]) : y[i]);
    }
  }
}

// A lane's share of a slab: kVector<T> fixed columns, of which it holds scale and bias in registers.
template <typename T>
class SlabEpilogue {
 public:
  static constexpr int kWidth = kVector<T>;
  static constexpr int kLanesPerRow = kSlabColumns / kWidth;
  static constexpr int kRowsPerPass = 32 / kLanesPerRow;

  // first_column: the slab's first filter within the group.
  __device__ __forceinline__ SlabEpilogue(const ConvProblem& problem, int group, int first_column, int lane)
      : problem_(problem), lane_row_(lane / kLanesPerRow), lane_column_(lane % kLanesPerRow * kWidth) {
    column_ = first_column + lane_column_;
    const int64_t group_first = static_cast<int64_t>(group) * problem.shape.filters;
    channel_ = group_first + column_;
    const int64_t end = group_first + problem.shape.filters;
    load_coefficients<kWidth>(scale_, problem.scale, channel_, end, 1.0f);
    load_coefficients<kWidth>(bias_, problem.bias, channel_, end, 0.0f);
  }

  // Stores the 16 rows from first_row on. The caller has filled the slab and synchronised the warp.
  __device__ __forceinline__ void store_rows(const float* slab, int first_row) const {
    if (column_ >= problem_.shape.filters) return;
#pragma unroll
    for (int pass = 0; pass < kSlabRows / kRowsPerPass; ++pass) {
      const int slab_row = lane_row_ + pass * kRowsPerPass;
      const int row = first_row + slab_row;
      if (row >= problem_.shape.rows) continue;
      const float* from = slab + slab_row * kSlabPitch + lane_column_;
      float y[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) y[i] = from[i] * scale_[i] + bias_[i];
      finish_row<T>(problem_, y, row, column_, channel_);
    }
  }

 private:
  const ConvProblem& problem_;
  int lane_row_, lane_column_;
  int column_;
  int64_t channel_;
  float scale_[kWidth], bias_[kWidth];
};

// One 16x8 accumulator into columns 8 * atom.. of a slab.
__device__ __forceinline__ void accumulator_to_slab(float* slab, int atom, const float* accumulator, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* to = slab + accumulator_row(lane, 2 * half) * kSlabPitch + atom * 8 + accumulator_column(lane, 2 * half);
    *reinterpret_cast<float2*>(to) = make_float2(accumulator[2 * half], accumulator[2 * half + 1]);
  }
}

}  // namespace fastcnn::cuda
