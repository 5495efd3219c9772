// Max pooling of a stem convolution's rows on their way to memory (conv2d_stem_pool.cu): over rows in registers, over
// columns from a staged row in shared memory. Values are compared in the output's dtype, as the pooling of a stored
// convolution would: a larger value or a NaN wins.
#pragma once

#include "../conv2d_problem.h"
#include "numeric.cuh"
#include "pool_index.h"
#include "ptx.cuh"
#include "stem_pool_layout.h"
#include "stem_store.cuh"

namespace fastcnn::cuda {

// Two values below all others.
template <typename T>
constexpr uint32_t kLowestPair = std::is_same_v<T, __nv_bfloat16> ? 0xff80ff80u : 0xfc00fc00u;

template <typename T>
__device__ __forceinline__ uint4 max_vectors(const uint4& a, const uint4& b) {
  return make_uint4(max_pair<T>(a.x, b.x), max_pair<T>(a.y, b.y), max_pair<T>(a.z, b.z), max_pair<T>(a.w, b.w));
}

// What a lane holds of the row that waits for the rest of its window: eight neighbouring filters of every 32 of two
// columns, as 16-byte vectors. Rows come as accumulators.
template <typename T>
class PooledRow {
 public:
  static constexpr int kGroups = kStemPoolColumns / 32;
  using Accumulators = float[kStemPoolColumns / 8][4];

  // The first row of a window; `real`: it lies in the convolution's output.
  __device__ __forceinline__ void start(const Accumulators& acc, const float* scales, bool real, int lane) {
    each(acc, scales, lane, [&](int group, int half, uint4 y) { row_[group][half] = real ? y : lowest(); });
  }

  // The second row.
  __device__ __forceinline__ void add(const Accumulators& acc, const float* scales, int lane) {
    each(acc, scales, lane,
         [&](int group, int half, uint4 y) { row_[group][half] = max_vectors<T>(row_[group][half], y); });
  }

  // The third row: the maxima go to the staged row, the row itself is the next window's first.
  __device__ __forceinline__ void finish(const Accumulators& acc, const float* scales, bool real, int lane,
                                         unsigned char* staged, int column, int half_step) {
    each(acc, scales, lane, [&](int group, int half, uint4 y) {
      if (!real) y = lowest();
      const int offset = staged_offset(column + half * half_step, 4 * group + lane % 4);
      *reinterpret_cast<uint4*>(staged + offset) = max_vectors<T>(row_[group][half], y);
      row_[group][half] = y;
    });
  }

 private:
  uint4 row_[kGroups][2];

  static __device__ __forceinline__ uint4 lowest() {
    return make_uint4(kLowestPair<T>, kLowestPair<T>, kLowestPair<T>, kLowestPair<T>);
  }

  template <typename Use>
  static __device__ __forceinline__ void each(const Accumulators& acc, const float* scales, int lane, const Use& use) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const Coefficients of(scales, scales + kStemPoolColumns, 32 * group + 8 * (lane % 4));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* pair = &acc[4 * group + e][2 * half];
          words[e] = round_pair<T, false>(pair[0] * of.scale[2 * e] + of.bias[2 * e],
                                          pair[1] * of.scale[2 * e + 1] + of.bias[2 * e + 1]);
        }
        use(group, half, make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }
};

// Row `row` of a walk's output: maxima over three columns of the staged row, of those that are there. ReLU commutes
// with the maximum: it is a zero among the values.
template <typename T>
__device__ __forceinline__ void store_pooled_row(const ConvProblem& problem, const StemPoolPlan& pool,
                                                 const StemWalk& walk, int row, const unsigned char* staged,
                                                 int first_filter, int thread, int threads) {
  constexpr int kVectors = kStemPoolColumns / 8;
  const int vector = thread % kVectors;
  if (first_filter + 8 * vector >= problem.shape.filters) return;
  const int32_t line = (walk.image * pool.out_h + walk.p + row) * pool.out_w + walk.q;
  T* out = static_cast<T*>(problem.out) + line * problem.out_stride + first_filter + 8 * vector;
  const int columns = smaller(pool.columns, pool.out_w - walk.q);
  const uint32_t least = problem.relu ? 0u : kLowestPair<T>;
  const int strip = 2 * walk.q - pool.pad_left;  // the strip's first column
  for (int q = thread / kVectors; q < columns; q += threads / kVectors) {
    uint4 y = make_uint4(least, least, least, least);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (static_cast<uint32_t>(strip + 2 * q + i) < static_cast<uint32_t>(pool.stem.out_w)) {
        y = max_vectors<T>(y, *reinterpret_cast<const uint4*>(staged + staged_offset(2 * q + i, vector)));
      }
    }
    store_16(out + q * problem.out_stride, y);
  }
}

}  // namespace fastcnn::cuda
