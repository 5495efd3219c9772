// Short fp32 weights: see linear_short.h. Compiled for every instruction set, with AVX-512 alone it has something to
// do.
#include "table.h"
#include "variant.h"

#if defined(__AVX512BW__)
#include "linear_short.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns of what its own intrinsics leave undefined without a mask

struct ShortFloats {
  using Item = float;
  using Weights = __m512;
  static constexpr int64_t kLanes = kLinearShortLanes, kBlockBytes = kLinearShortBlockBytes;

  __m512i exponents;  // by the four bits

  explicit ShortFloats(uint32_t first_exponent) {
    uint32_t table[16] = {};
    for (uint32_t n = 1; n < 16; ++n) table[n] = (first_exponent + n - 1) << 23;
    exponents = _mm512_loadu_si512(table);
  }

  // 16 values of 3 bytes each into the upper bytes of their lanes, then down by 8: the sign fills the exponent's place.
  static __m512i fractions(const uint8_t* from) {
    const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0);
    const __m512i bytes =
        _mm512_maskz_broadcast_i32x4(kAll, _mm_setr_epi8(-1, 0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11));
    const __m512i packed = _mm512_maskz_loadu_epi32(0xfff, from);
    const __m512i spread = _mm512_shuffle_epi8(_mm512_maskz_permutexvar_epi32(kAll, quarters, packed), bytes);
    return _mm512_maskz_srai_epi32(kAll, spread, 8);
  }

  __m512 value(__m512i fractions, __m512i four_bits) const {
    const __m512i kept = _mm512_set1_epi32(static_cast<int>(0x807fffffu));
    const __m512i exponent =
        _mm512_maskz_permutexvar_epi32(kAll, four_bits, exponents);  // looks at the lower four bits
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(fractions, kept, exponent, 0xea));  // (a & b) | c
  }

  void decode(const uint8_t* block, Weights (&w)[kLinearShortRows]) const {
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair) {
      const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 192 + 16 * pair));
      const __m512i four_bits = _mm512_maskz_cvtepu8_epi32(kAll, both);
      w[2 * pair] = value(fractions(block + 96 * pair), four_bits);
      w[2 * pair + 1] = value(fractions(block + 96 * pair + 48), _mm512_maskz_srli_epi32(kAll, four_bits, 4));
    }
  }

  static void put(Weights& w, int lane, uint32_t bits) {
    w = _mm512_castsi512_ps(
        _mm512_mask_set1_epi32(_mm512_castps_si512(w), static_cast<__mmask16>(1u << lane), static_cast<int>(bits)));
  }
  static Weights load(const float* x, int64_t count) {
    return count == kLanes ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(first_lanes(count), x);
  }
  static __m512 add(__m512 sum, Weights x, Weights w) { return _mm512_fmadd_ps(x, w, sum); }
};

}  // namespace

void linear_short_task(const LinearShortProblem& problem, int64_t index) {
  run_short<ShortFloats>(problem, index);
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
#endif
