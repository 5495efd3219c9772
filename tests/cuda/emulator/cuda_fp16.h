#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  const float sign = x.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude == 0.0f) return {sign};
  int exponent = 0;
  std::frexp(magnitude, &exponent);                            // magnitude = f * 2^exponent, f in [0.5, 1)
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;  // exponent of the last bit kept
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // Steps count units from zero in this binade; carrying into the next binade keeps the encoding right.
  return {static_cast<uint16_t>(sign | (unit == -24 ? steps : ((unit + 24) << 10) + steps))};
}
