// The sum of a vector's lanes, in one order for all fully connected layers, whatever reads their weights.
#pragma once

#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {

static inline float add_lanes(Vector v) {
#if FASTCNN_HAS_SHUFFLE && defined(__AVX512F__)
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1);
  return v[0] + v[1];
#elif FASTCNN_HAS_SHUFFLE && defined(__AVX2__)
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1);
  return v[0] + v[1];
#else
  float lanes[kVectorWidth];
  store(lanes, v);
#pragma GCC unroll 4
  for (int width = kVectorWidth / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
#endif
}

// The sums of the lanes of 8 vectors in memory, in the first 8 lanes: the same additions, for all at once.
static inline Vector add_lanes_of_8(const float* sums) {
#if FASTCNN_HAS_SHUFFLE && defined(__AVX512F__)
  // Half of the lanes of two vectors each, added to the other half.
  Vector half[4], quarter[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vector a = load(sums + 2 * i * kVectorWidth), b = load(sums + (2 * i + 1) * kVectorWidth);
    half[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
              __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vector a = half[2 * i], b = half[2 * i + 1];
    quarter[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                 __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  const Vector a = quarter[0], b = quarter[1];
  const Vector pairs = __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
                       __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  return __builtin_shufflevector(pairs, pairs, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(pairs, pairs, 1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  Vector result{};
  for (int i = 0; i < 8 && i < kVectorWidth; ++i) result[i] = add_lanes(load(sums + i * kVectorWidth));
  return result;
#endif
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
