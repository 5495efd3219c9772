// Division by a number known at launch, as one multiplication and a shift (Granlund and Montgomery, PLDI 1994).
//
// With l = ceil(log2 d), p = 31 + l and m = ceil(2^p / d), the error m*d - 2^p is below d <= 2^l, so for every
// 0 <= n < 2^31 the quotient floor(n / d) equals floor(n * m / 2^p), and m fits 32 bits.
#pragma once

#include <cstdint>

#include "portable.h"

namespace fastcnn::cuda {

struct FastDivisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 0;  // 0 marks division by 1
  uint32_t shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    if (d <= 1) return;
    uint32_t log2 = 0;
    while ((int64_t{1} << log2) < d) ++log2;
    const uint64_t power = uint64_t{1} << (31 + log2);
    multiplier = static_cast<uint32_t>((power + static_cast<uint64_t>(d) - 1) / static_cast<uint64_t>(d));
    shift = log2 - 1;
  }

  // n must be in [0, 2^31).
  FASTCNN_HD int32_t quotient(int32_t n) const {
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier) >> 32);
    return multiplier == 0 ? n : static_cast<int32_t>(high >> shift);
  }

  FASTCNN_HD int32_t divide(int32_t n, int32_t& remainder) const {
    const int32_t q = quotient(n);
    remainder = n - q * static_cast<int32_t>(divisor);
    return q;
  }
};

}  // namespace fastcnn::cuda
