// Short bf16 weights: see linear_short.h. Products by bf16 dot products, as in linear_bf16.cpp.
#include "linear_short.h"
#include "variant_bf16.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

struct ShortBf16 {
  using Item = uint16_t;
  using Weights = __m512bh;
  static constexpr int64_t kLanes = kLinearShortBf16Lanes, kBlockBytes = kLinearShortBf16BlockBytes;

  __m512i exponents;  // by the four bits, twice: the lookup takes five

  explicit ShortBf16(uint32_t first_exponent) {
    uint16_t table[32] = {};
    for (uint32_t n = 1; n < 16; ++n) {
      table[n] = table[16 + n] = static_cast<uint16_t>((first_exponent + n - 1) << 7);
    }
    exponents = _mm512_loadu_si512(table);
  }

  // The sign fills the exponent's place.
  static __m512i fractions(const uint8_t* from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  __m512bh value(__m512i fractions, __m512i four_bits) const {
    const __m512i kept = _mm512_set1_epi16(static_cast<int16_t>(0x807f));
    const __m512i exponent = _mm512_permutexvar_epi16(four_bits, exponents);
    return (__m512bh)_mm512_ternarylogic_epi32(fractions, kept, exponent, 0xea);  // (a & b) | c
  }

  void decode(const uint8_t* block, Weights (&w)[kLinearShortRows]) const {
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 128 + 32 * pair));
      const __m512i four_bits = _mm512_cvtepu8_epi16(both);
      w[2 * pair] = value(fractions(block + 64 * pair), four_bits);
      w[2 * pair + 1] = value(fractions(block + 64 * pair + 32), _mm512_srli_epi16(four_bits, 4));
    }
  }

  static void put(Weights& w, int lane, uint32_t bits) {
    w = (__m512bh)_mm512_mask_set1_epi16((__m512i)w, __mmask32{1} << lane, static_cast<int16_t>(bits));
  }
  static Weights load(const uint16_t* x, int64_t count) {
    return count == kLanes ? (__m512bh)_mm512_loadu_epi16(x)
                           : (__m512bh)_mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, x);
  }
  static __m512 add(__m512 sum, Weights x, Weights w) { return _mm512_dpbf16_ps(sum, x, w); }
};

}  // namespace

void linear_short_bf16_task(const LinearShortProblem& problem, int64_t index) {
  run_short<ShortBf16>(problem, index);
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
