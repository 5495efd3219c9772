// Short fp32 weights: see linear_short.h. Compiled for every instruction set, with AVX-512 alone it has something to
// do.
#include "table.h"
#include "variant.h"

#if defined(__AVX512BW__)
#include "linear_short.h"
#include "short_floats.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

struct ShortFloats {
  using Item = float;
  using Weights = __m512;
  static constexpr int64_t kLanes = kLinearShortLanes, kBlockBytes = kLinearShortBlockBytes;

  ShortFloatDecoder decoder;

  explicit ShortFloats(uint32_t first_exponent) : decoder(first_exponent) {}

  void decode(const uint8_t* block, Weights (&w)[kLinearShortRows]) const {
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair) {
      const uint8_t* fractions = block + 96 * pair;
      decoder.decode(fractions, fractions + 48, block + 192 + 16 * pair, w[2 * pair], w[2 * pair + 1]);
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
