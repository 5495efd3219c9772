// Decodes short fp32 weights (linear_short.h) where permutations are dear: eight values of 28 bits lie in each lane of
// seven vectors of 8 words. Word i from 0 to 6:
//
//   bit 31: sign of value i;  30..27: a seventh of value 7;  26..23: exponent of value i, four bits;  22..0: its
//   fraction
//
// Value 7 is sign, exponent and fraction from word 6's part down to word 0's.
//
// Without that part a word is an fp32 value with an exponent from 0 to 15. A product with a power of two gives it its
// own, exactly, and leaves a zero what it is; denormals are stored beside, as exceptions. 64 values take about 45
// instructions of vectors with their multiplications by one input row: 11 cycles, where memory takes 40.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

class ShortWordDecoder {
 public:
  explicit ShortWordDecoder(uint32_t first_exponent) {
    const uint32_t bits = (first_exponent - 1 + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    scale_ = _mm256_set1_ps(scale);
  }

  // use(i, vector) for the eight vectors in turn.
  template <typename Use>
  __attribute__((always_inline)) void decode(const uint8_t* unit, Use use) const {
    const __m256i part = _mm256_set1_epi32(0x78000000);
    __m256i last = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < 7; ++i) {
      const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(unit + 32 * i));
      last = _mm256_or_si256(_mm256_srli_epi32(last, 4), _mm256_and_si256(word, part));
      use(i, value(word));
    }
    // The sign fills the place of the part.
    use(7, value(_mm256_srai_epi32(_mm256_slli_epi32(last, 1), 4)));
  }

 private:
  __m256 value(__m256i word) const {
    const __m256i kept = _mm256_set1_epi32(static_cast<int>(0x87ffffffu));
    return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(word, kept)), scale_);
  }

  __m256 scale_;
};

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
