// The sum of a vector's lanes, in one order for all fully connected layers, whatever reads their weights.
#pragma once

#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTCNN_HAS_SHUFFLE 1
#endif
#endif

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

}  // namespace fastcnn::cpu::FASTCNN_ISA
