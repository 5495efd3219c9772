// A fully connected layer of bf16 tensors with few input rows by bf16 dot products (AVX512-BF16). The weights are read
// as the user left them.
//
//   y[m, k] = act(sum_c x[m, c] * w[k, c] + bias[k])
//
// Shapes: x (M, C), w (K, C), y (M, K), rows at any stride, M at most kLinearFewRows. Both operands are contiguous
// along the reduction, so a vector holds 32 consecutive c of one row; vdpbf16ps multiplies and adds them pair by pair
// without widening. An accumulator is the partial sums of one (m, k) pair; its lanes are added at the end.
//
// Work: a task owns all M input rows x `columns_per_task` weight rows, 4 of them at a time: 4 streams, which is what
// the prefetchers follow best. Registers: up to 4 x 4 accumulators, 4 weight vectors, one input.
//
// Floor: K*C weights of 2 bytes from memory, each read once.
#include <immintrin.h>

#include "linear_lanes.h"
#include "variant_bf16.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kTileRows = 4, kTileColumns = 4;
constexpr int64_t kLanes = 32;  // bf16 values in a vector

// sums[i][j]: x row i against weight row j, over `count` values.
template <int Rows, int Columns>
static void dot_products(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t w_stride, int64_t count,
                         float (*sums)[kTileColumns]) {
  __m512 sum[Rows][Columns];
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  const auto add = [&](int64_t c, __mmask32 mask) __attribute__((always_inline)) {
    __m512bh weight[Columns];
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) {
      weight[j] = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + j * w_stride + c);
    }
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const __m512bh value = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + i * x_stride + c);
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], value, weight[j]);
    }
  };
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) add(c, ~__mmask32{0});
  if (c < count) add(c, static_cast<__mmask32>((uint64_t{1} << (count - c)) - 1));
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) sums[i][j] = add_lanes((Vector)sum[i][j]);
  }
}

using DotProducts = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, float (*)[kTileColumns]);

// By the number of input rows; full tiles of columns, and single columns for what is left over.
constexpr DotProducts kFull[] = {nullptr, dot_products<1, kTileColumns>, dot_products<2, kTileColumns>,
                                 dot_products<3, kTileColumns>, dot_products<4, kTileColumns>};
constexpr DotProducts kSingle[] = {nullptr, dot_products<1, 1>, dot_products<2, 1>, dot_products<3, 1>,
                                   dot_products<4, 1>};

}  // namespace

void linear_few_rows_bf16_task(const LinearProblem& problem, int64_t index) {
  const int64_t first = index * problem.columns_per_task;
  const int64_t left = problem.columns - first;
  const int64_t last = first + (left < problem.columns_per_task ? left : problem.columns_per_task);
  const uint16_t* x = static_cast<const uint16_t*>(problem.input);
  const uint16_t* w = static_cast<const uint16_t*>(problem.weight);
  uint16_t* out = static_cast<uint16_t*>(problem.out);
  const int64_t tiles = (problem.rows + kTileRows - 1) / kTileRows;
  float sums[kTileRows][kTileColumns];
  for (int64_t k = first; k < last;) {
    const int64_t width = last - k >= kTileColumns ? kTileColumns : 1;
    int64_t m = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t height = (problem.rows - m + tiles - tile - 1) / (tiles - tile);  // nearly equal tiles
      (width == 1 ? kSingle : kFull)[height](x + m * problem.input_stride, problem.input_stride,
                                             w + k * problem.weight_stride, problem.weight_stride, problem.depth, sums);
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) {
          const float value = sums[i][j] + (problem.bias != nullptr ? problem.bias[k + j] : 0.0f);
          store_one(out + (m + i) * problem.out_stride + k + j, problem.relu ? relu(value) : value);
        }
      }
      m += height;
    }
    k += width;
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
