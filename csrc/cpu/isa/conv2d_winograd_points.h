// Winograd's transforms of one column, for each number of points: conv2d_winograd.cpp says how they are chosen.
//
//   input:  b = B^T a   values of the input polynomial's pieces at the points
//   output: b = A^T a   outputs of the products at the points; how many depends on the taps, side + 1 - outputs
//
// Points come in pairs +-p, so that even and odd powers are summed once for both; the last one is infinity.
#pragma once

#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

template <int Side>
struct Points;

// a * b + c. What is rounded is said wherever products are added: left to the compiler, it would depend on what else is
// in a function, and two kernels, or one kernel before and after a change elsewhere, would not have the same bits.
template <bool Fused>
static inline Vector plus(float a, Vector b, Vector c) {
  return Fused ? fused(a, b, c) : rounded(a * b) + c;
}

// 0, +-5/8, +-3/2, infinity.
template <>
struct Points<6> {
  static constexpr float p = 0.625f, q = 1.5f, pp = p * p, qq = q * q;
  // b = B^T a, in pairs that have terms in common: kPairs says which two of b a pair holds.
  static constexpr int kPairs[3][2] = {{0, 5}, {1, 2}, {3, 4}};
  template <int Pair>
  static inline void input(const Vector (&a)[6], Vector& first, Vector& second) {
    if constexpr (Pair == 0) {
      first = (pp * qq) * a[0] + (a[4] - (pp + qq) * a[2]);
      second = (pp * qq) * a[1] + (a[5] - (pp + qq) * a[3]);
    } else {
      constexpr float own = Pair == 1 ? p : q, other = Pair == 1 ? qq : pp;
      const Vector even = a[4] - other * a[2], odd = own * (a[3] - other * a[1]);
      first = even + odd;
      second = even - odd;
    }
  }
  // b = A^T a, for 4 outputs and 2; Fused: with products that are not rounded for themselves where they need not be
  template <bool Fused = true>
  static inline void output(const Vector (&a)[6], Vector (&b)[4]) {
    const Vector sum_p = a[1] + a[2], difference_p = a[1] - a[2];
    const Vector sum_q = a[3] + a[4], difference_q = a[3] - a[4];
    b[0] = a[0] + sum_p + sum_q;
    b[1] = plus<Fused>(p, difference_p, rounded(q * difference_q));
    b[2] = plus<Fused>(pp, sum_p, rounded(qq * sum_q));
    b[3] = plus<Fused>(p * pp, difference_p, rounded(q * qq * difference_q)) + a[5];
  }
  static inline void output(const Vector (&a)[6], Vector (&b)[2]) {
    b[0] = a[0] + (a[1] + a[2]) + (a[3] + a[4]);
    b[1] = fused(q, a[3] - a[4], fused(p, a[1] - a[2], a[5]));
  }
};

// 0, +-1, infinity.
template <>
struct Points<4> {
  static constexpr int kPairs[2][2] = {{0, 3}, {1, 2}};
  template <int Pair>
  static inline void input(const Vector (&a)[4], Vector& first, Vector& second) {
    first = Pair == 0 ? a[2] - a[0] : a[2] + a[1];
    second = Pair == 0 ? a[3] - a[1] : a[2] - a[1];
  }
  static inline void output(const Vector (&a)[4], Vector (&b)[2]) {
    b[0] = a[0] + a[1] + a[2];
    b[1] = a[1] - a[2] + a[3];
  }
};

// +-1, infinity.
template <>
struct Points<3> {
  static inline void input(const Vector (&a)[3], Vector (&b)[3]) {
    b[0] = a[1] + a[0];
    b[1] = a[1] - a[0];
    b[2] = a[2] - a[0];
  }
  static inline void output(const Vector (&a)[3], Vector (&b)[2]) {
    b[0] = a[0] + a[1];
    b[1] = a[0] - a[1] + a[2];
  }
};

// +-3/8, +-5/4, infinity.
template <>
struct Points<5> {
  static constexpr float p = 0.375f, q = 1.25f, pp = p * p, qq = q * q;
  static inline void input(const Vector (&a)[5], Vector (&b)[5]) {
    const auto pair = [&](float at, float other, Vector& plus, Vector& minus) {
      const Vector even = a[3] - other * a[1], odd = a[2] - other * a[0];
      plus = even + at * odd;
      minus = even - at * odd;
    };
    pair(p, qq, b[0], b[1]);
    pair(q, pp, b[2], b[3]);
    b[4] = (a[4] - (pp + qq) * a[2]) + (pp * qq) * a[0];
  }
  static inline void output(const Vector (&a)[5], Vector (&b)[4]) {
    const Vector sum_p = a[0] + a[1], sum_q = a[2] + a[3];
    const Vector difference_p = rounded(p * (a[0] - a[1])), difference_q = a[2] - a[3];
    b[0] = sum_p + sum_q;
    b[1] = fused(q, difference_q, difference_p);
    b[2] = fused(pp, sum_p, rounded(qq * sum_q));
    b[3] = fused(q * qq, difference_q, fused(pp, difference_p, a[4]));
  }
};

// +-3/8, +-7/8, +-7/4, infinity.
template <>
struct Points<7> {
  static constexpr float p = 0.375f, q = 0.875f, r = 1.75f, pp = p * p, qq = q * q, rr = r * r;
  static inline void input(const Vector (&a)[7], Vector (&b)[7]) {
    const auto pair = [&](float at, float sum, float product, Vector& plus, Vector& minus) {
      const Vector even = (a[5] - sum * a[3]) + product * a[1], odd = (a[4] - sum * a[2]) + product * a[0];
      plus = even + at * odd;
      minus = even - at * odd;
    };
    pair(p, qq + rr, qq * rr, b[0], b[1]);
    pair(q, pp + rr, pp * rr, b[2], b[3]);
    pair(r, pp + qq, pp * qq, b[4], b[5]);
    b[6] = ((a[6] - (pp + qq + rr) * a[4]) + (pp * qq + pp * rr + qq * rr) * a[2]) - (pp * qq * rr) * a[0];
  }
  static inline void output(const Vector (&a)[7], Vector (&b)[4]) {
    const Vector sum_p = a[0] + a[1], sum_q = a[2] + a[3], sum_r = a[4] + a[5];
    const Vector difference_p = rounded(p * (a[0] - a[1])), difference_q = a[2] - a[3], difference_r = a[4] - a[5];
    b[0] = sum_p + sum_q + sum_r;
    b[1] = fused(r, difference_r, fused(q, difference_q, difference_p));
    b[2] = fused(rr, sum_r, fused(pp, sum_p, rounded(qq * sum_q)));
    const Vector near = fused(q * qq, difference_q, fused(pp, difference_p, a[6]));
    b[3] = fused(r * rr, difference_r, near);
  }
};

// 0, +-1/2, +-1, +-2, infinity.
template <>
struct Points<8> {
  static constexpr float p = 0.5f, r = 2, pp = p * p, rr = r * r;  // and 1
  static constexpr int kPairs[4][2] = {{0, 7}, {1, 2}, {3, 4}, {5, 6}};
  template <int Pair>
  static inline void input(const Vector (&a)[8], Vector& first, Vector& second) {
    if constexpr (Pair == 0) {
      constexpr float middle = 1 + pp + rr;  // of both (x^2 - pp)(x^2 - 1)(x^2 - rr)'s inner terms, as pp * rr is 1
      first = (a[6] - a[0]) - middle * (a[4] - a[2]);
      second = (a[7] - a[1]) - middle * (a[5] - a[3]);
    } else {
      // Of the other two pairs: the sum and the product of their squares.
      constexpr float own = Pair == 1 ? p : Pair == 2 ? 1 : r, square = own * own;
      constexpr float sum = 1 + pp + rr - square, product = 1 / square;
      const Vector even = (a[6] - sum * a[4]) + product * a[2], odd = (a[5] - sum * a[3]) + product * a[1];
      first = even + own * odd;
      second = even - own * odd;
    }
  }
  // For 6 outputs and 4.
  template <int Outputs>
  static inline void output(const Vector (&a)[8], Vector (&b)[Outputs]) {
    const Vector sum_p = a[1] + a[2], sum_1 = a[3] + a[4], sum_r = a[5] + a[6];
    const Vector difference_p = a[1] - a[2], difference_1 = a[3] - a[4], difference_r = a[5] - a[6];
    b[0] = a[0] + (sum_p + sum_1 + sum_r);
    b[1] = fused(r, difference_r, fused(p, difference_p, difference_1));
    b[2] = fused(rr, sum_r, fused(pp, sum_p, sum_1));
    b[3] = fused(r * rr, difference_r, fused(p * pp, difference_p, difference_1));
    if constexpr (Outputs == 6) {
      b[4] = fused(rr * rr, sum_r, fused(pp * pp, sum_p, sum_1));
      b[5] = fused(r * rr * rr, difference_r, fused(p * pp * pp, difference_p, difference_1));
    }
    b[Outputs - 1] += a[7];
  }
};

// b = B^T a as a whole.
template <int Side>
static inline void input_transform(const Vector (&a)[Side], Vector (&b)[Side]) {
  if constexpr (Side % 2 == 1) {
    Points<Side>::input(a, b);
  } else {
    constexpr auto& pairs = Points<Side>::kPairs;
    Points<Side>::template input<0>(a, b[pairs[0][0]], b[pairs[0][1]]);
    Points<Side>::template input<1>(a, b[pairs[1][0]], b[pairs[1][1]]);
    if constexpr (Side >= 6) Points<Side>::template input<2>(a, b[pairs[2][0]], b[pairs[2][1]]);
    if constexpr (Side == 8) Points<Side>::template input<3>(a, b[pairs[3][0]], b[pairs[3][1]]);
  }
}

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
