// exp, tanh, erf and their like on vectors, to within two units in the last place of the result (GELU and Mish: of the
// largest of the sums that make it). NaN gives NaN. Polynomials were fitted to float64 values by iteratively reweighted
// least squares; the comment at each tells its interval and its own error, which is below fp32's rounding.
#pragma once

#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {

static inline Words bits_of(Vector x) {
  return reinterpret_cast<Words>(x);
}
static inline Vector from_bits(Words x) {
  return reinterpret_cast<Vector>(x);
}
static inline Vector absolute(Vector x) {
  return from_bits(bits_of(x) & 0x7fffffffu);
}
// |magnitude| with the sign of `sign`; magnitude must not be negative.
static inline Vector with_sign(Vector magnitude, Vector sign) {
  return from_bits(bits_of(magnitude) | (bits_of(sign) & 0x80000000u));
}
// A bound that lets NaN through, as at_least().
static inline Vector at_most(Vector x, Vector bound) {
  return x > bound ? bound : x;
}
static inline Vector clamp(Vector x, float low, float high) {
  return at_most(at_least(x, broadcast(low)), broadcast(high));
}

// exp(r) - 1 = r + r^2 Q(r) for |r| <= ln(2) / 2; relative error of r + r^2 Q: 2.4e-10.
static inline Vector expm1_small(Vector r) {
  Vector q = broadcast(1.991370653e-4f);
  q = q * r + 1.394111607e-3f;
  q = q * r + 8.333273916e-3f;
  q = q * r + 4.166635330e-2f;
  q = q * r + 1.666666681e-1f;
  q = q * r + 5.000000047e-1f;
  return q * (r * r) + r;
}

// exp(x) = 2^n exp(r) with n = round(x / ln 2). ln 2 is split so that n times its first part is exact.
static inline Vector exp(Vector x) {
  x = clamp(x, -104.0f, 89.0f);                // beyond: 0 and infinity
  const Vector magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Vector shifted = x * 1.44269504f + magic;
  const Vector n = shifted - magic;
  const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // 2^n in two factors, as n may lie beyond the exponents of normal numbers.
  typedef int32_t Integers __attribute__((vector_size(kVectorWidth * 4)));
  const Integers power = reinterpret_cast<Integers>(bits_of(shifted) - 0x4b400000u);
  const Integers half = power >> 1;
  const Vector first = from_bits(reinterpret_cast<Words>((half + 127) << 23));
  const Vector second = from_bits(reinterpret_cast<Words>((power - half + 127) << 23));
  return (expm1_small(r) + 1.0f) * first * second;
}

static inline Vector expm1(Vector x) {
  const Vector small = expm1_small(x), large = exp(x) - 1.0f;
  return absolute(x) < broadcast(0.3465f) ? small : large;
}

static inline Vector sigmoid(Vector x) {
  return 1.0f / (1.0f + exp(-x));
}

// x + x^3 P(x^2) for |x| < 0.6 (relative error 2.6e-9), else 1 - 2 / (exp(2 |x|) + 1) with x's sign.
static inline Vector tanh(Vector x) {
  const Vector s = x * x, a = absolute(x);
  Vector p = broadcast(-5.905867948e-3f);
  p = p * s + 2.080538418e-2f;
  p = p * s + -5.378668345e-2f;
  p = p * s + 1.333195824e-1f;
  p = p * s + -3.333329927e-1f;
  const Vector small = p * (s * x) + x;
  const Vector large = with_sign(1.0f - 2.0f / (exp(a + a) + 1.0f), x);
  return a < broadcast(0.6f) ? small : large;
}

// x P(x^2) for |x| < 1 (error 1.2e-9), else 1 - exp(R(|x|)) with x's sign, R(t) = log(erfc(t)) up to 4 (error of erfc:
// 1.1e-9); beyond, erf rounds to 1.
static inline Vector erf(Vector x) {
  const Vector s = x * x, a = absolute(x), t = at_most(a, broadcast(4.0f));
  Vector p = broadcast(7.889119539e-5f);
  p = p * s + -8.020841282e-4f;
  p = p * s + 5.189535340e-3f;
  p = p * s + -2.685444459e-2f;
  p = p * s + 1.128360018e-1f;
  p = p * s + -3.761262714e-1f;
  p = p * s + 1.128379166f;
  Vector r = broadcast(1.867767820e-4f);
  r = r * t + -2.951874795e-3f;
  r = r * t + 2.185630418e-2f;
  r = r * t + -1.031479534e-1f;
  r = r * t + -6.380935832e-1f;
  r = r * t + -1.127122488f;
  r = r * t + -3.326920282e-4f;
  return a < broadcast(1.0f) ? p * x : with_sign(1.0f - exp(r), x);
}

static inline Vector square_root(Vector x) {
  Vector y;
  for (int i = 0; i < kVectorWidth; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
