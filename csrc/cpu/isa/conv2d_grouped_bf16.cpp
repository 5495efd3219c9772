// Grouped convolution of bf16 tensors with few channels a group, as many outputs as inputs (ResNeXt), by bf16 dot
// products (AVX512-BF16).
//
//   y[p, k] = act(scale[k] * sum_{r,s,j} pro(x[p; r, s, g(k)*G + j]) * w[k; r, s, j] + bias[k] + residual[p, k])
//
// with G = 2, 4, 8 or 16 channels a group. 16 input channels are 8 pairs of adjacent bf16 values. Lane l of a vector of
// output channels needs the pairs (l / G) * G/2 + j for j = 0 .. G/2-1, always of the same 16 channels. So 32 bytes are
// read, a permutation inside the register brings each lane its pair, and G/2 dot products make a tap: nothing is
// widened, wasted or gathered.
//
// Weights: [16 channels][tap][j][lane][2]. A task owns one output row x a few blocks of 16 channels; registers hold the
// accumulators of up to 14 output pixels, a tap's weights and the permutations. Taps in the padding are skipped,
// per row for r; for s they read as zero.
//
// Floor: 2*N*P*Q*K*R*S*G FLOPs at twice the FMA rate, each dot product with a permutation beside it; or one pass over
// input and output.
#include <immintrin.h>

#include "variant_bf16.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int64_t kChannels = 16;  // of a block

struct Block {
  const Conv2dBf16Problem* problem;
  const uint16_t* weight;  // this block's taps
  int64_t channel, lanes;  // first channel, channels that exist
  __mmask32 mask;          // of the channels that exist
  Vector input_scale, input_shift;
};

// Lane l takes pair (l / Group) * Group/2 + j.
template <int Group>
static inline __m512i choice(int j) {
  alignas(64) int32_t from[16];
  for (int lane = 0; lane < 16; ++lane) from[lane] = lane / Group * (Group / 2) + j;
  return _mm512_load_si512(from);
}

// A pixel's 16 channels; those that do not exist, and a pixel outside the image, are zero.
template <bool HasPrologue>
static inline __m512i read_input(const Block& block, const uint16_t* pixel, bool inside) {
  if constexpr (!HasPrologue) {
    return _mm512_maskz_loadu_epi16(inside ? block.mask : 0, pixel);  // what a mask leaves out is not read
  } else {
    if (!inside) return _mm512_setzero_si512();
    Vector x = load_some(pixel, block.lanes);
    x = x * block.input_scale + block.input_shift;
    if (block.problem->input_relu) x = relu(x);
    return (__m512i)_mm512_cvtne2ps_pbh(__m512{}, (__m512)x);
  }
}

static inline void finish(const Block& block, int64_t pixel, Vector sum) {
  const Conv2dBf16Problem& problem = *block.problem;
  Vector value = sum * load(problem.scale + block.channel) + load(problem.bias + block.channel);
  if (problem.residual) {
    value += load_some(
        static_cast<const uint16_t*>(problem.residual.data) + pixel * problem.residual.pixel_stride + block.channel,
        block.lanes);
  }
  if (problem.relu) value = relu(value);
  uint16_t* out = static_cast<uint16_t*>(problem.out.data) + pixel * problem.out.pixel_stride + block.channel;
  _mm256_mask_storeu_epi16(out, static_cast<__mmask16>(block.mask), (__m256i)_mm512_cvtneps_pbh((__m512)value));
}

// Output pixels [q, q + Pixels) of one row.
template <int Group, int Pixels, bool HasPrologue>
static void row_tile(const Block& block, const uint16_t* image, int64_t ih, int64_t first_pixel, int64_t q) {
  constexpr int kPairs = Group / 2;
  const Conv2dGeometry& g = block.problem->geometry;
  const TensorView& x = block.problem->input;
  __m512i from[kPairs];
#pragma GCC unroll 8
  for (int j = 0; j < kPairs; ++j) from[j] = choice<Group>(j);
  __m512 sum[Pixels];
#pragma GCC unroll 16
  for (int i = 0; i < Pixels; ++i) sum[i] = _mm512_setzero_ps();
  const int64_t stride = g.stride_w * x.pixel_stride;
  for (int64_t r = 0; r < g.filter_h; ++r) {
    const int64_t h = ih + r * g.dilation_h;
    if (h < 0 || h >= x.h) continue;
    const uint16_t* row = image + h * x.w * x.pixel_stride + block.channel;
    for (int64_t s = 0; s < g.filter_w; ++s) {
      const uint16_t* weight = block.weight + (r * g.filter_w + s) * Group * kChannels;
      int64_t w = q * g.stride_w - g.pad_left + s * g.dilation_w;
      const uint16_t* pixel = row + w * x.pixel_stride;
      __m512bh factor[kPairs];
#pragma GCC unroll 8
      for (int j = 0; j < kPairs; ++j) factor[j] = (__m512bh)_mm512_loadu_si512(weight + j * 2 * kChannels);
#pragma GCC unroll 16
      for (int i = 0; i < Pixels; ++i, w += g.stride_w, pixel += stride) {
        const __m512i value = read_input<HasPrologue>(block, pixel, w >= 0 && w < x.w);
#pragma GCC unroll 8
        for (int j = 0; j < kPairs; ++j) {
          const __m512i pairs = _mm512_maskz_permutexvar_epi32(0xffff, from[j], value);
          sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)pairs, factor[j]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Pixels; ++i) finish(block, first_pixel + q + i, (Vector)sum[i]);
}

// The same for a filter of three adjacent taps and stride 1, without a prologue: a pixel's pairs serve all three. What
// they are multiplied with is in registers for one pair of every group at a time.
template <int Group, int Pixels>
static void row_tile_of_three(const Block& block, const uint16_t* image, int64_t ih, int64_t first_pixel, int64_t q) {
  const Conv2dGeometry& g = block.problem->geometry;
  const TensorView& x = block.problem->input;
  __m512 sum[Pixels];
#pragma GCC unroll 16
  for (int i = 0; i < Pixels; ++i) sum[i] = _mm512_setzero_ps();
  const int64_t first = q - g.pad_left;
  // One bit for each input pixel that lies inside.
  const uint32_t inside = [&] {
    uint32_t bits = 0;
    for (int i = 0; i < Pixels + 2; ++i) bits |= static_cast<uint32_t>(first + i >= 0 && first + i < x.w) << i;
    return bits;
  }();
  for (int64_t r = 0; r < g.filter_h; ++r) {
    const int64_t h = ih + r * g.dilation_h;
    if (h < 0 || h >= x.h) continue;
    const uint16_t* row = image + (h * x.w + first) * x.pixel_stride + block.channel;
    const uint16_t* weight = block.weight + r * 3 * Group * kChannels;
    for (int j = 0; j < Group / 2; ++j) {
      const __m512i from = choice<Group>(j);
      __m512bh factor[3];
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        factor[s] = (__m512bh)_mm512_loadu_si512(weight + (s * Group / 2 + j) * 2 * kChannels);
      }
      const uint16_t* pixel = row;
#pragma GCC unroll 16
      for (int i = 0; i < Pixels + 2; ++i, pixel += x.pixel_stride) {
        const __m512i value = read_input<false>(block, pixel, (inside >> i & 1) != 0);
        const __m512bh pairs = (__m512bh)_mm512_maskz_permutexvar_epi32(0xffff, from, value);
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) {
          if (i >= s && i - s < Pixels) sum[i - s] = _mm512_dpbf16_ps(sum[i - s], pairs, factor[s]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Pixels; ++i) finish(block, first_pixel + q + i, (Vector)sum[i]);
}

template <int Group, bool HasPrologue>
static void run_row(const Conv2dBf16Problem& problem, int64_t row, int64_t first_block, int64_t last_block) {
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& x = problem.input;
  const int64_t out_w = problem.out.w, first_pixel = row * out_w;
  const int64_t n = row / problem.out.h, p = row % problem.out.h;
  const uint16_t* image = static_cast<const uint16_t*>(x.data) + n * x.h * x.w * x.pixel_stride;
  const int64_t ih = p * g.stride_h - g.pad_top;
  for (int64_t b = first_block; b < last_block; ++b) {
    Block block;
    block.problem = &problem;
    block.weight = problem.packed_weight + b * g.filter_h * g.filter_w * Group * kChannels;
    block.channel = b * kChannels;
    block.lanes = x.c - block.channel < kChannels ? x.c - block.channel : kChannels;
    block.mask = (1u << block.lanes) - 1;
    block.input_scale = broadcast(1.0f);
    block.input_shift = Vector{};
    if (problem.input_scale != nullptr) block.input_scale = load_some(problem.input_scale + block.channel, block.lanes);
    if (problem.input_shift != nullptr) block.input_shift = load_some(problem.input_shift + block.channel, block.lanes);
    int64_t q = 0;
    if (!HasPrologue && g.filter_w == 3 && g.stride_w == 1 && g.dilation_w == 1) {
      for (; q + 14 <= out_w; q += 14) row_tile_of_three<Group, 14>(block, image, ih, first_pixel, q);
      for (; q + 7 <= out_w; q += 7) row_tile_of_three<Group, 7>(block, image, ih, first_pixel, q);
      for (; q + 3 <= out_w; q += 3) row_tile_of_three<Group, 3>(block, image, ih, first_pixel, q);
    }
    for (; q + 14 <= out_w; q += 14) row_tile<Group, 14, HasPrologue>(block, image, ih, first_pixel, q);
    for (; q + 7 <= out_w; q += 7) row_tile<Group, 7, HasPrologue>(block, image, ih, first_pixel, q);
    for (; q + 3 <= out_w; q += 3) row_tile<Group, 3, HasPrologue>(block, image, ih, first_pixel, q);
    for (; q < out_w; ++q) row_tile<Group, 1, HasPrologue>(block, image, ih, first_pixel, q);
  }
}

template <int Group>
static void run(const Conv2dBf16Problem& problem, int64_t row, int64_t first_block, int64_t last_block) {
  if (problem.input_scale != nullptr || problem.input_shift != nullptr || problem.input_relu) {
    run_row<Group, true>(problem, row, first_block, last_block);
  } else {
    run_row<Group, false>(problem, row, first_block, last_block);
  }
}

}  // namespace

void conv2d_grouped_bf16_task(const Conv2dBf16Problem& problem, int64_t index) {
  const int64_t blocks = problem.column_blocks;
  const int64_t column_tasks = (blocks + problem.blocks_per_task - 1) / problem.blocks_per_task;
  const int64_t row = index / column_tasks, first = index % column_tasks * problem.blocks_per_task;
  const int64_t last = first + problem.blocks_per_task < blocks ? first + problem.blocks_per_task : blocks;
  switch (problem.group_in) {
    case 2:
      return run<2>(problem, row, first, last);
    case 4:
      return run<4>(problem, row, first, last);
    case 8:
      return run<8>(problem, row, first, last);
    default:
      return run<16>(problem, row, first, last);
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
