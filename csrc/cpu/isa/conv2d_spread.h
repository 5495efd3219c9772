// How a channel reaches the lanes of its group, in convolutions whose groups are no wider than a vector.
#pragma once

#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

// Lane l takes lane (l / Group) * Group + j.
template <int Group>
static inline Vector spread(Vector x, int j) {
  if constexpr (Group == 1) return x;
  typedef int32_t Lanes __attribute__((vector_size(kVectorWidth * 4)));
#if defined(__clang__)
  Vector result;
  for (int lane = 0; lane < kVectorWidth; ++lane) result[lane] = x[lane / Group * Group + j];
  return result;
#else
  Lanes from;
  for (int lane = 0; lane < kVectorWidth; ++lane) from[lane] = lane / Group * Group + j;
  return __builtin_shuffle(x, from);
#endif
}

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
