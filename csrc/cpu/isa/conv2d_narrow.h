// Direct convolution into few output channels, at most half a vector (6 of AVX2's 8): output pixels across the lanes.
//
// A micro-tile of conv2d_micro.h puts output channels across the lanes: of 16 lanes the 6 channels of a first layer
// (LeNet-5) leave 10 idle. Here a vector is 16 pixels of one output channel, adjacent ones of a row. Input rows lie in
// planes,
//
//   [input row][input channel][column modulo the step][column div the step]
//
// so that what a filter tap brings to adjacent pixels is adjacent; the step is the stride. The rows of one channel with
// stride 1 are that already; others are taken apart once a task. A micro-tile is up to two output rows x two vectors x
// all channels, in registers: a load of input serves all channels, a weight in every lane all pixels. Its values then
// go to the lanes where memory has them, pixel by pixel: each of the K vectors of the output takes its lanes from the
// vectors of K channels, two at a time (`lanes`, filled by conv2d.cpp).
//
// Max pooling of 2x2 windows with stride 2 (problem.max_pool, asked for by a frozen model) is taken from the registers:
// one vector holds the even pixels of a row, another the odd ones, so a lane's window is four vectors. The step is then
// twice the stride.
//
// The reduction is summed in the order of conv2d_micro.h, one FMA after the other, so results have the same bits.
//
// In L1: the planes and the weights. Floor: N*P*Q*K*R*S*C products by full vectors.
#pragma once

#include "conv2d_gather.h"
#include "table.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kNarrowChannels = narrow_channels(kVectorWidth);

// Lane f is lane index[f] of x and, behind it, y; where that is no lane, of `otherwise`.
static inline Vector merged(Vector otherwise, Vector x, Vector y, Words index) {
#if defined(__AVX512F__)
  const __mmask16 taken = _mm512_cmplt_epu32_mask((__m512i)index, _mm512_set1_epi32(2 * kVectorWidth));
  return (Vector)_mm512_mask_mov_ps((__m512)otherwise, taken,
                                    _mm512_permutex2var_ps((__m512)x, (__m512i)index, (__m512)y));
#elif defined(__AVX2__)
  const Vector low = (Vector)_mm256_permutevar8x32_ps((__m256)x, (__m256i)index);
  const Vector high = (Vector)_mm256_permutevar8x32_ps((__m256)y, (__m256i)index);
  return index < Words{} + kVectorWidth ? low : index < Words{} + 2 * kVectorWidth ? high : otherwise;
#else
  for (int f = 0; f < kVectorWidth; ++f) {
    const auto lane = static_cast<int>(index[f] % kVectorWidth);
    otherwise[f] = index[f] < kVectorWidth ? x[lane] : index[f] < 2 * kVectorWidth ? y[lane] : otherwise[f];
  }
  return otherwise;
#endif
}

struct NarrowTile {
  const float* x;          // what the first filter tap brings to the first pixel
  const int32_t* offsets;  // of a filter row's values, for the first and the second vector of pixels
  int64_t run, runs;       // values of a filter row, filter rows
  int64_t down, row_step;  // floats from one filter row to the next, and from one convolved row to the next
  const float *weights, *scale, *bias;
  const uint32_t* lanes;  // [vector of the output][pair of channels][lane]
  bool has_relu;
  float* out;
  int64_t out_step, pixels;  // from one output row to the next; valid ones of this tile
};

// One vector of pixels to memory, at most `pixels` of them.
template <int Channels>
static inline void narrow_store(const NarrowTile& tile, const Vector (&value)[Channels], int64_t pixels, float* out) {
  const uint32_t* lanes = tile.lanes;
  for (int64_t left = pixels * Channels; left > 0; left -= kVectorWidth, out += kVectorWidth) {
    Vector result{};
#pragma GCC unroll 4
    for (int k = 0; k < Channels; k += 2, lanes += kVectorWidth) {
      const Words index = reinterpret_cast<Words>(load(reinterpret_cast<const float*>(lanes)));
      result = merged(result, value[k], value[k + 1 < Channels ? k + 1 : k], index);
    }
    if (left < kVectorWidth) {
      store_some(out, result, left);
    } else {
      store(out, result);
    }
  }
}

// The sums of some convolved rows from `x` on, with scale and bias.
template <int Channels, int Rows, int Vectors>
static inline __attribute__((always_inline)) void narrow_sums(const NarrowTile& tile, const float* x,
                                                              Vector (&sum)[Channels][Rows][Vectors]) {
#pragma GCC unroll 8
  for (int k = 0; k < Channels; ++k) {
#pragma GCC unroll 2
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sum[k][i][j] = Vector{};
    }
  }
  const float* weight = tile.weights;
  for (int64_t r = 0; r < tile.runs; ++r, x += tile.down) {
    for (int64_t at = 0; at < tile.run; ++at, weight += kColumnBlock) {
      Vector value[Rows][Vectors];
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) {
        const float* from = x + tile.offsets[2 * at + j];
#pragma GCC unroll 2
        for (int i = 0; i < Rows; ++i) value[i][j] = load(from + i * tile.row_step);
      }
#pragma GCC unroll 8
      for (int k = 0; k < Channels; ++k) {
        const Vector w = broadcast(weight[k]);
#pragma GCC unroll 2
        for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
          for (int j = 0; j < Vectors; ++j) sum[k][i][j] += value[i][j] * w;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < Channels; ++k) {
    const Vector scale = broadcast(tile.scale[k]), bias = broadcast(tile.bias[k]);
#pragma GCC unroll 2
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sum[k][i][j] = sum[k][i][j] * scale + bias;
    }
  }
}

template <int Channels, int Vectors, int Rows>
static void narrow_kernel(const NarrowTile& tile) {
  Vector sum[Channels][Rows][Vectors];
  narrow_sums(tile, tile.x, sum);
#pragma GCC unroll 2
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      Vector value[Channels];
#pragma GCC unroll 8
      for (int k = 0; k < Channels; ++k) value[k] = tile.has_relu ? relu(sum[k][i][j]) : sum[k][i][j];
      const int64_t left = tile.pixels - j * kVectorWidth;
      narrow_store(tile, value, left < kVectorWidth ? left : kVectorWidth,
                   tile.out + i * tile.out_step + j * kVectorWidth * Channels);
    }
  }
}

// Two vectors of pixels where the sums of two rows of them fit the registers.
constexpr int narrow_vectors(int channels) {
  return 4 * channels <= (kVectorWidth == 16 ? 24 : 12) ? 2 : 1;
}

// A vector of pixels after pooling.
template <int Channels>
static void narrow_pooled_kernel(const NarrowTile& tile) {
  constexpr int kRows = narrow_vectors(Channels);  // of sums at once
  Vector most[Channels];
#pragma GCC unroll 2
  for (int row = 0; row < 2; row += kRows) {
    Vector sum[Channels][kRows][2];
    narrow_sums(tile, tile.x + row * tile.row_step, sum);
#pragma GCC unroll 8
    for (int k = 0; k < Channels; ++k) {
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const Vector of_row = larger(sum[k][i][0], sum[k][i][1]);
        most[k] = row + i == 0 ? of_row : larger(most[k], of_row);
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < Channels; ++k) most[k] = tile.has_relu ? relu(most[k]) : most[k];
  narrow_store(tile, most, tile.pixels < kVectorWidth ? tile.pixels : kVectorWidth, tile.out);
}

using NarrowKernel = void (*)(const NarrowTile&);

struct NarrowKernels {
  NarrowKernel by_size[kNarrowChannels + 1][3][3] = {};  // [channels][vectors][rows]
  NarrowKernel pooled[kNarrowChannels + 1] = {};
  constexpr NarrowKernels() { fill<kNarrowChannels>(); }
  template <int Channels>
  constexpr void fill() {
    by_size[Channels][1][1] = narrow_kernel<Channels, 1, 1>;
    by_size[Channels][1][2] = narrow_kernel<Channels, 1, 2>;
    if constexpr (narrow_vectors(Channels) == 2) {
      by_size[Channels][2][1] = narrow_kernel<Channels, 2, 1>;
      by_size[Channels][2][2] = narrow_kernel<Channels, 2, 2>;
    }
    pooled[Channels] = narrow_pooled_kernel<Channels>;
    if constexpr (Channels > 1) fill<Channels - 1>();
  }
};

constexpr NarrowKernels kNarrow;

// Planes into which a row of one channel is taken apart.
static int64_t plane_step(const Conv2dProblem& problem) {
  return problem.convolved(problem.geometry.stride_w);
}

static bool has_planes(const Conv2dProblem& problem) {
  return problem.group_in == 1 && plane_step(problem) == 1;
}

// Floats of a plane's row: some pixels beyond the last are read.
static int64_t plane_pitch(const Conv2dProblem& problem) {
  const int64_t step = plane_step(problem), pixels = (problem.strip_pixels + step - 1) / step;
  return (pixels + 15) / 16 * 16 + 16;
}

static int64_t narrow_scratch_floats(const Conv2dProblem& problem) {
  if (has_planes(problem)) return 0;
  const int64_t planes = problem.group_in * plane_step(problem);
  return problem.input_rows(problem.tile_rows) * planes * plane_pitch(problem);
}

// One channel's even and odd pixels.
static inline void take_pairs_apart(const float* from, int64_t count, float* even, float* odd) {
  int64_t at = 0;
#if FASTCNN_HAS_SHUFFLE && defined(__AVX512F__)
#define FASTCNN_EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define FASTCNN_ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif FASTCNN_HAS_SHUFFLE && defined(__AVX2__)
#define FASTCNN_EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14
#define FASTCNN_ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15
#endif
#ifdef FASTCNN_EVEN_LANES
  for (; at + 2 * kVectorWidth <= count; at += 2 * kVectorWidth) {
    const Vector a = load(from + at), b = load(from + at + kVectorWidth);
    store(even + at / 2, __builtin_shufflevector(a, b, FASTCNN_EVEN_LANES));
    store(odd + at / 2, __builtin_shufflevector(a, b, FASTCNN_ODD_LANES));
  }
#endif
  for (; at + 1 < count; at += 2) even[at / 2] = from[at], odd[at / 2] = from[at + 1];
  if (at < count) even[at / 2] = from[at];
}

static void take_apart(const Conv2dProblem& problem, int64_t rows, const StripRows& strip, float* planes) {
  const int64_t channels = problem.group_in, step = plane_step(problem), pitch = plane_pitch(problem);
  const int64_t pixels = problem.strip_pixels;
  const float* from = strip.first;
  if (channels == 1 && step == 2) {
    for (int64_t row = 0; row < rows; ++row, from += strip.pitch, planes += 2 * pitch) {
      take_pairs_apart(from, pixels, planes, planes + pitch);
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row, from += strip.pitch, planes += channels * step * pitch) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t phase = 0; phase < step; ++phase) {
        float* to = planes + (c * step + phase) * pitch;
        for (int64_t w = phase; w < pixels; w += step) *to++ = from[w * channels + c];
      }
    }
  }
}

// Output rows [p0, p0 + rows) of image n, from their input rows; `planes`: scratch memory.
static void run_narrow(const Conv2dProblem& problem, int64_t n, int64_t p0, int64_t rows, const StripRows& strip,
                       float* planes) {
  const Conv2dGeometry& g = problem.geometry;
  const int64_t channels = problem.group_out, in_channels = problem.group_in, step = plane_step(problem);
  const int64_t values = problem.out.w * channels, pitch = has_planes(problem) ? strip.pitch : plane_pitch(problem);
  if (!has_planes(problem)) take_apart(problem, problem.input_rows(rows), strip, planes);
  int32_t offsets[2 * kMaxChunk];
  for (int64_t s = 0; s < g.filter_w; ++s) {
    for (int64_t c = 0; c < in_channels; ++c) {
      const auto at = [&](int64_t column) {
        return static_cast<int32_t>((c * step + column % step) * pitch + column / step);
      };
      int32_t* to = offsets + 2 * (s * in_channels + c);
      to[0] = at(s);
      to[1] = problem.max_pool ? at(s + g.stride_w) : to[0] + kVectorWidth;
    }
  }
  const int64_t input_row = in_channels * step * pitch;
  NarrowTile tile;
  tile.offsets = offsets;
  tile.run = g.filter_w * in_channels;
  tile.runs = g.filter_h;
  tile.down = g.dilation_h * input_row;
  tile.row_step = g.stride_h * input_row;
  tile.weights = problem.packed_weight;
  tile.scale = problem.scale;
  tile.bias = problem.bias;
  tile.lanes = problem.narrow_lanes;
  tile.has_relu = problem.relu;
  tile.out_step = values;
  const float* from = has_planes(problem) ? strip.first : planes;
  const int64_t most = narrow_vectors(static_cast<int>(channels));
  for (int64_t row = 0; row < rows;) {
    const int64_t height = problem.max_pool || rows - row < 2 ? 1 : 2;  // output rows
    float* out = static_cast<float*>(problem.out.data) + (n * problem.out.h + p0 + row) * values;
    for (int64_t q = 0; q < problem.out.w;) {
      const int64_t left = problem.out.w - q, vectors = left > kVectorWidth && !problem.max_pool ? most : 1;
      tile.x = from + problem.convolved(row) * tile.row_step + q;
      tile.out = out + q * channels;
      tile.pixels = left;
      (problem.max_pool ? kNarrow.pooled[channels] : kNarrow.by_size[channels][vectors][height])(tile);
      q += vectors * kVectorWidth;
    }
    row += height;
  }
}

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
