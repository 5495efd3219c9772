// Winograd convolution F(2x2, 3x3) of bf16 tensors with products in bf16 (AVX512-BF16).
//
//   y = act(scale[k] * A^T [ sum_c bf16(G w[k,c] G^T) . bf16(B^T pro(x)[c] B) ] A + bias[k] + residual)
//
// Layouts, work and transforms, which are computed in fp32, are those of conv2d_winograd.cpp; a word of the panel and
// of the weights holds two adjacent channels, which vdpbf16ps multiplies and adds up in fp32:
//
//   transformed input  [tile block][point][32 channels][tile][32]
//   weights            [column block][point][pair of channels][kColumnBlock][2]
//
// Against the plain sum of bf16 products: 2.25 times fewer of them, for 16/9 times the bytes of weights. Rounding the
// transformed values adds about 1.4 times the error of rounding the result does to a layer's; 4x4 tiles, whose
// transforms enlarge errors more, would not keep to the accuracy rule.
//
// Floor: 2*16*tiles*C*K FLOPs at twice the FMA rate, plus the transforms.
#include <immintrin.h>

#include "conv2d_winograd.h"
#include "variant_bf16.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

struct Bf16Products {
  static constexpr int64_t kChunkRuns = INT64_MAX / 2;  // an fp32 sum's rounding does not count here
  static constexpr int64_t kVectorChannels = 2 * kVectorWidth;

  template <typename T, int kTile>
  static inline void transform(const WinogradProblem& problem, const TilePlace& place, Phase, int64_t channel,
                               int64_t point_stride, float* to) {
    Vector low[kTile][kTile];
    transform_vector<T, kTile>(problem, place, channel,
                               [&](int i, int j, Vector value) __attribute__((always_inline)) { low[i][j] = value; });
    const auto put = [&](int i, int j, Vector value) __attribute__((always_inline)) {
      const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh((__m512)value, (__m512)low[i][j]);
      _mm512_storeu_si512(to + (i * kTile + j) * point_stride, pairs);
    };
    if (channel + kVectorWidth < problem.input.c) {
      transform_vector<T, kTile>(problem, place, channel + kVectorWidth, put);
    } else {
      for (int i = 0; i < kTile; ++i) {
        for (int j = 0; j < kTile; ++j) put(i, j, Vector{});
      }
    }
  }
  static inline Vector spread(const float* word) {
    int32_t pair;
    std::memcpy(&pair, word, 4);
    return (Vector)_mm512_set1_epi32(pair);
  }
  static inline void add(Vector& sum, Vector x, Vector w) {
    sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
};

}  // namespace

int64_t winograd_bf16_scratch_bytes(const WinogradProblem& problem) {
  return scratch_bytes(problem);
}

void winograd_bf16_task(const WinogradProblem& problem, int64_t index, void* scratch) {
  run<Bf16Products, 2, 4>(problem, index, static_cast<float*>(scratch));
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
