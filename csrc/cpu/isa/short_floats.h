// Decodes short fp32 weights (linear_short.h): three bytes of sign and fraction, four bits for the exponent.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns of what its own intrinsics leave undefined without a mask

class ShortFloatDecoder {
 public:
  explicit ShortFloatDecoder(uint32_t first_exponent) {
    uint32_t table[16] = {};
    for (uint32_t n = 1; n < 16; ++n) table[n] = (first_exponent + n - 1) << 23;
    exponents_ = _mm512_loadu_si512(table);
  }

  // Two vectors: 48 bytes each of signs and fractions, and 16 bytes of both exponents, the first one's in the lower
  // half.
  void decode(const uint8_t* first, const uint8_t* second, const uint8_t* both, __m512& a, __m512& b) const {
    const __m512i codes = _mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(both)));
    a = value(fractions(first), codes);
    b = value(fractions(second), _mm512_maskz_srli_epi32(kAll, codes, 4));
  }

 private:
  // 16 values of 3 bytes each into the upper bytes of their lanes, then down by 8: the sign fills the exponent's place.
  static __m512i fractions(const uint8_t* from) {
    const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0);
    const __m512i bytes =
        _mm512_maskz_broadcast_i32x4(kAll, _mm_setr_epi8(-1, 0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11));
    const __m512i packed = _mm512_maskz_loadu_epi32(0xfff, from);
    const __m512i spread = _mm512_shuffle_epi8(_mm512_maskz_permutexvar_epi32(kAll, quarters, packed), bytes);
    return _mm512_maskz_srai_epi32(kAll, spread, 8);
  }

  __m512 value(__m512i fractions, __m512i codes) const {
    const __m512i kept = _mm512_set1_epi32(static_cast<int>(0x807fffffu));
    const __m512i exponent = _mm512_maskz_permutexvar_epi32(kAll, codes, exponents_);  // looks at the lower four bits
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(fractions, kept, exponent, 0xea));  // (a & b) | c
  }

  __m512i exponents_;  // by code
};

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
