// Direct convolution into few output channels, at most half a vector: output pixels across the lanes.
//
// A micro-tile of conv2d_micro.h puts output channels across the lanes: of 16 lanes the 6 channels of a first layer
// (LeNet-5) leave 10 idle. Here a vector is 16 adjacent pixels of one output channel. Input rows lie in planes,
//
//   [input row][input channel][column modulo the stride][column div the stride]
//
// so that what a filter tap brings to adjacent pixels is adjacent. A strip of one channel with stride 1 is that
// already; others are taken apart once a task. A micro-tile is up to two output rows x two vectors x all channels, in
// registers: a load of input serves all channels, a weight in every lane all pixels. Its values then go to the lanes
// where memory has them, pixel by pixel: each of the K vectors of the output takes its lanes from the K channels'
// vectors (`lanes`, filled by conv2d.cpp).
//
// Max pooling of 2x2 windows with stride 2 (problem.max_pool, asked for by a frozen model) is taken from the registers:
// the larger of the two rows, then of neighbouring lanes; even lanes go to memory.
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

constexpr int kNarrowChannels = kVectorWidth / 2 > 0 ? kVectorWidth / 2 : 1;

// Lane f is lane index[f] of x; where that is no lane, of `otherwise`.
static inline Vector merged(Vector otherwise, Vector x, Words index) {
#if defined(__AVX512F__)
  const __mmask16 taken = _mm512_cmplt_epu32_mask((__m512i)index, _mm512_set1_epi32(kVectorWidth));
  return (Vector)_mm512_mask_permutexvar_ps((__m512)otherwise, taken, (__m512i)index, (__m512)x);
#elif defined(__AVX2__)
  return index < Words{} + kVectorWidth ? (Vector)_mm256_permutevar8x32_ps((__m256)x, (__m256i)index) : otherwise;
#else
  for (int f = 0; f < kVectorWidth; ++f) otherwise[f] = index[f] < kVectorWidth ? x[index[f]] : otherwise[f];
  return otherwise;
#endif
}

// The larger one; NaN wins, as in max_pool2d.
static inline Vector larger_value(Vector a, Vector b) {
  return (a > b) | (a != a) ? a : b;
}

struct NarrowTile {
  const float* x;          // what the first filter tap brings to the first pixel
  const int32_t* offsets;  // of a filter row's values
  int64_t run, runs;       // values of a filter row, filter rows
  int64_t down, row_step;  // floats from one filter row to the next, and from one output row's to the next's
  const float *weights, *scale, *bias;
  const uint32_t* lanes;  // [vector of the output][channel][lane]
  bool has_relu, max_pool;
  float* out;
  int64_t out_step, pixels;  // from one output row to the next; valid ones of this tile, after pooling
};

// One vector of pixels (of every second lane where pooled) to memory, at most `pixels` of them.
template <int Channels>
static inline void narrow_store(const NarrowTile& tile, const Vector (&value)[Channels], int64_t pixels, float* out) {
  const uint32_t* lanes = tile.lanes;
  for (int64_t left = pixels * Channels; left > 0; left -= kVectorWidth, out += kVectorWidth) {
    Vector result{};
#pragma GCC unroll 8
    for (int k = 0; k < Channels; ++k, lanes += kVectorWidth) {
      const Words index = reinterpret_cast<Words>(load(reinterpret_cast<const float*>(lanes)));
      result = merged(result, value[k], index);
    }
    if (left < kVectorWidth) {
      store_some(out, result, left);
    } else {
      store(out, result);
    }
  }
}

template <int Channels, int Vectors, int Rows>
static void narrow_kernel(const NarrowTile& tile) {
  Vector sum[Channels][Rows][Vectors];
#pragma GCC unroll 8
  for (int k = 0; k < Channels; ++k) {
#pragma GCC unroll 2
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sum[k][i][j] = Vector{};
    }
  }
  const float* weight = tile.weights;
  for (int64_t r = 0; r < tile.runs; ++r) {
    const float* row = tile.x + r * tile.down;
    for (int64_t at = 0; at < tile.run; ++at, weight += kColumnBlock) {
      const float* from = row + tile.offsets[at];
      Vector x[Rows][Vectors];
#pragma GCC unroll 2
      for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) x[i][j] = load(from + i * tile.row_step + j * kVectorWidth);
      }
#pragma GCC unroll 8
      for (int k = 0; k < Channels; ++k) {
        const Vector w = broadcast(weight[k]);
#pragma GCC unroll 2
        for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
          for (int j = 0; j < Vectors; ++j) sum[k][i][j] += x[i][j] * w;
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
      for (int j = 0; j < Vectors; ++j) {
        sum[k][i][j] = sum[k][i][j] * scale + bias;
        if (tile.has_relu) sum[k][i][j] = relu(sum[k][i][j]);
      }
    }
  }
  Vector value[Channels];
  if (tile.max_pool) {
    Words neighbour;
    for (int f = 0; f < kVectorWidth; ++f) neighbour[f] = static_cast<uint32_t>(f) ^ 1u;
    constexpr int64_t kPixels = kVectorWidth / 2;
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
#pragma GCC unroll 8
      for (int k = 0; k < Channels; ++k) {
        const Vector most = larger_value(sum[k][0][j], sum[k][Rows - 1][j]);
        value[k] = larger_value(most, merged(most, most, neighbour));
      }
      const int64_t left = tile.pixels - j * kPixels;
      narrow_store(tile, value, left < kPixels ? left : kPixels, tile.out + j * kPixels * Channels);
    }
    return;
  }
#pragma GCC unroll 2
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
#pragma GCC unroll 8
      for (int k = 0; k < Channels; ++k) value[k] = sum[k][i][j];
      const int64_t left = tile.pixels - j * kVectorWidth;
      narrow_store(tile, value, left < kVectorWidth ? left : kVectorWidth,
                   tile.out + i * tile.out_step + j * kVectorWidth * Channels);
    }
  }
}

using NarrowKernel = void (*)(const NarrowTile&);

// Two vectors of pixels where the sums of two rows of them fit the registers.
constexpr int narrow_vectors(int channels) {
  return 4 * channels <= (kVectorWidth == 16 ? 24 : 12) ? 2 : 1;
}

struct NarrowKernels {
  NarrowKernel by_size[kNarrowChannels + 1][3][3] = {};  // [channels][vectors][rows]
  constexpr NarrowKernels() { fill<kNarrowChannels>(); }
  template <int Channels>
  constexpr void fill() {
    by_size[Channels][1][1] = narrow_kernel<Channels, 1, 1>;
    by_size[Channels][1][2] = narrow_kernel<Channels, 1, 2>;
    if constexpr (narrow_vectors(Channels) == 2) {
      by_size[Channels][2][1] = narrow_kernel<Channels, 2, 1>;
      by_size[Channels][2][2] = narrow_kernel<Channels, 2, 2>;
    }
    if constexpr (Channels > 1) fill<Channels - 1>();
  }
};

constexpr NarrowKernels kNarrow;

static bool has_planes(const Conv2dProblem& problem) {
  return problem.group_in == 1 && problem.geometry.stride_w == 1;
}

// Floats of a plane's row: some pixels beyond the last are read.
static int64_t plane_pitch(const Conv2dProblem& problem) {
  const int64_t stride = problem.geometry.stride_w, pixels = (problem.strip_pixels + stride - 1) / stride;
  return (pixels + 15) / 16 * 16 + 16;
}

static int64_t narrow_scratch_floats(const Conv2dProblem& problem) {
  if (has_planes(problem)) return 0;
  const int64_t planes = problem.group_in * problem.geometry.stride_w;
  return problem.input_rows(problem.tile_rows) * planes * plane_pitch(problem);
}

static void take_apart(const Conv2dProblem& problem, int64_t rows, const float* strip, float* planes) {
  const int64_t channels = problem.group_in, stride = problem.geometry.stride_w, pitch = plane_pitch(problem);
  for (int64_t row = 0; row < rows; ++row, strip += problem.strip_pitch, planes += channels * stride * pitch) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t phase = 0; phase < stride; ++phase) {
        float* to = planes + (c * stride + phase) * pitch;
        for (int64_t w = phase; w < problem.strip_pixels; w += stride) *to++ = strip[w * channels + c];
      }
    }
  }
}

// Output rows [p0, p0 + rows) of image n, from their strip; `planes`: memory behind it.
static void run_narrow(const Conv2dProblem& problem, int64_t n, int64_t p0, int64_t rows, const float* strip,
                       float* planes) {
  const Conv2dGeometry& g = problem.geometry;
  const int64_t channels = problem.group_out, in_channels = problem.group_in, stride = g.stride_w;
  const int64_t values = problem.out.w * channels, window = problem.max_pool ? 2 : 1;
  const int64_t pitch = has_planes(problem) ? problem.strip_pitch : plane_pitch(problem);
  if (!has_planes(problem)) take_apart(problem, problem.input_rows(rows), strip, planes);
  int32_t offsets[kMaxChunk];
  for (int64_t s = 0; s < g.filter_w; ++s) {
    for (int64_t c = 0; c < in_channels; ++c) {
      offsets[s * in_channels + c] = static_cast<int32_t>((c * stride + s % stride) * pitch + s / stride);
    }
  }
  const int64_t input_row = in_channels * stride * pitch;
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
  tile.max_pool = problem.max_pool;
  tile.out_step = values;
  const float* from = has_planes(problem) ? strip : planes;
  const int64_t most = narrow_vectors(static_cast<int>(channels)), vector_pixels = kVectorWidth / window;
  for (int64_t row = 0; row < rows;) {
    const int64_t height = problem.max_pool ? 1 : rows - row < 2 ? 1 : 2;  // output rows
    float* out = static_cast<float*>(problem.out.data) + (n * problem.out.h + p0 + row) * values;
    for (int64_t q = 0; q < problem.out.w;) {
      const int64_t left = problem.out.w - q, vectors = left > vector_pixels ? most : 1;
      tile.x = from + row * window * tile.row_step + q * window;
      tile.out = out + q * channels;
      tile.pixels = left;
      kNarrow.by_size[channels][vectors][height * window](tile);
      q += vectors * vector_pixels;
    }
    row += height;
  }
}

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
