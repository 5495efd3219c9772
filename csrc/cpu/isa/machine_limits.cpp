// What this processor can do at most, to measure kernels against: loops that do one thing and nothing else.
//
//   fma_loop:   a[i] = a[i] * 0.5 + 1 on independent accumulators held in registers, no memory traffic. Each converges
//   to
//               2, so neither overflow nor denormals slow it down, and the result shows that the work was done.
//   bf16_dot_loop:  the same with the processor's bf16 dot product, a[i] += x0 * y0 + x1 * y1 (x = y = 1).
//   read_loop:  the sum of a piece of memory, each value loaded once.
//
// An FMA takes about 4 cycles and 2 to 4 start in each, so 8 to 16 accumulators keep the units busy: 12 where there are
// 16 registers, 24 where there are 32. Each depends on its own last value, which no compiler may shortcut.
#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 24;
#else
constexpr int kAccumulators = 12;
#endif

}  // namespace

double fma_loop(int64_t iterations, float* mean) {
  const Vector half = broadcast(0.5f), one = broadcast(1.0f);
  Vector a[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) a[i] = broadcast(static_cast<float>(i));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kAccumulators; ++i) a[i] = a[i] * half + one;
  }
  Vector sum{};
  for (int i = 0; i < kAccumulators; ++i) sum += a[i];
  float total = 0;
  for (int i = 0; i < kVectorWidth; ++i) total += sum[i];
  *mean = total / (kAccumulators * kVectorWidth);
  return 2.0 * kAccumulators * kVectorWidth * static_cast<double>(iterations);
}

#if defined(__AVX512F__)
// For this function alone: the caller has asked the processor whether it has the instruction.
__attribute__((target("avx512bf16"))) double bf16_dot_loop(int64_t iterations, float* mean) {
  if (!__builtin_cpu_supports("avx512bf16")) return 0;
  const __m512bh ones = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f));
  __m512 a[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) a[i] = _mm512_setzero_ps();
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kAccumulators; ++i) a[i] = _mm512_dpbf16_ps(a[i], ones, ones);
  }
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < kAccumulators; ++i) sum = _mm512_add_ps(sum, a[i]);
  *mean = _mm512_reduce_add_ps(sum) / (kAccumulators * 16);
  return 4.0 * kAccumulators * 16 * static_cast<double>(iterations);
}
#else
double bf16_dot_loop(int64_t, float*) {
  return 0;
}
#endif

float read_loop(const float* data, int64_t count) {
  Vector a[8] = {};
  int64_t i = 0;
  for (; i + 8 * kVectorWidth <= count; i += 8 * kVectorWidth) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) a[j] += load(data + i + j * kVectorWidth);
  }
  Vector sum{};
  for (int j = 0; j < 8; ++j) sum += a[j];
  float total = 0;
  for (int j = 0; j < kVectorWidth; ++j) total += sum[j];
  for (; i < count; ++i) total += data[i];
  return total;
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
