// What the passes over plain weights (conv2d_winograd_plain.cpp) and over weights that are half transformed
// (conv2d_winograd_half.h) share.
#pragma once

#include "conv2d_winograd.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kSide = 6;
constexpr int kPointCount = kSide * kSide;
constexpr int kTaps = 9;
constexpr int kTilesAtOnce = kMicroRows >= 12 ? 4 : 2;
constexpr int64_t kChunkVectors = 32 / kVectorWidth;

constexpr float kNear = 0.625f, kFar = 1.5f;

// Rows 0 and +-5/8, or +-3/2 and infinity.
template <int Half>
static inline void transform_pair(Vector w0, Vector w1, Vector w2, Vector& plus, Vector& minus) {
  if constexpr (Half == 0) {
    const Vector even = w0 + (kNear * kNear) * w2;
    plus = even + w1, minus = even - w1;
  } else {
    const Vector even = w0 + (kFar * kFar) * w2;
    plus = even + (kFar / kNear) * w1, minus = even - (kFar / kNear) * w1;
  }
}
template <int Half>
static inline void transform_rows(const Vector (&w)[3], Vector (&u)[3]) {
  transform_pair<Half>(w[0], w[1], w[2], u[1 - Half], u[2 - Half]);
  u[2 * Half] = w[2 * Half];
}

static int64_t plain_product_stride(const WinogradProblem& problem) {
  return (problem.tiles_per_block | 1) * kVectorWidth;
}

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
