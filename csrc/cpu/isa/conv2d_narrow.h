// Direct convolution into few output channels, fewer than half a vector: output values in memory order across the
// lanes.
//
// A micro-tile of conv2d_micro.h puts output channels across the lanes: of 16 lanes the 6 channels of a first layer
// (LeNet-5) leave 10 idle. Here a vector is 16 adjacent values of an output row, lane f of vector v channel (16 v + f)
// mod K of pixel (16 v + f) div K. After K vectors, or a divisor of that, the pattern repeats; `phase` is a vector's
// place in it. For each filter tap the lanes' input pixels are a permutation of one vector of the strip. Of an input
// row these are brought once for all filter rows that meet it. The lanes' weights are vectors of a table
// [phase][reduction][lane] that is filled beforehand (conv2d.cpp).
//
// The reduction is summed in the order of conv2d_micro.h, one FMA after the other, so results have the same bits.
//
// Kept in registers: the sums of kMicroRows output rows, one vector of weights. In L1: the permuted inputs of a vector
// and those rows, and the table. Floor: N*P*Q*K*R*S*C products by full vectors, with one load for each.
#pragma once

#include "table.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

// Lane f is lane index[f] of x.
static inline Vector permuted(Vector x, Words index) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, (__m512)x);
#elif defined(__AVX2__)
  return (Vector)_mm256_permutevar8x32_ps((__m256)x, (__m256i)index);
#else
  Vector result{};
  for (int f = 0; f < kVectorWidth; ++f) result[f] = x[index[f]];
  return result;
#endif
}

constexpr int64_t kNarrowBytes = kConv2dNarrowBytes;  // of permuted inputs

struct NarrowTile {
  const float* inputs;   // [value of a filter row][input row][lane]
  int64_t column, down;  // floats from one value of a filter row to the next, and from one filter row to the next
  int64_t runs, run;     // filter rows, values of each
  int64_t row_step;      // floats from one output row's inputs to the next's
  const float* weights;  // of the vector's phase
  Vector scale, bias;
  bool has_relu;
  float* out;
  int64_t out_step, lanes;  // from one output row to the next; valid lanes
};

template <int Rows>
static void narrow_kernel(const NarrowTile& tile) {
  constexpr int kHalf = kMicroRows / 2;
  Vector sum[Rows];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) sum[i] = Vector{};
  const float* weight = tile.weights;
  int64_t step = tile.row_step, step3 = 3 * step, step5 = 5 * step;
  for (int64_t r = 0; r < tile.runs; ++r) {
    const float* from = tile.inputs + r * tile.down;
    const float* x[2] = {from, from + kHalf * step};
    for (int64_t k = 0; k < tile.run; ++k) {
      const Vector w = load(weight);
      weight += kVectorWidth;
      // Keeps the compiler from making a pointer for every row.
      __asm__("" : "+r"(x[0]), "+r"(x[1]), "+r"(step), "+r"(step3), "+r"(step5));
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const int at = i % kHalf;
        const int64_t ahead = at == 3 ? step3 : at == 5 ? step5 : at == 6 ? 2 * step3 : at * step;
        sum[i] += load(x[i / kHalf] + ahead) * w;
      }
      x[0] += tile.column, x[1] += tile.column;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    Vector value = sum[i] * tile.scale + tile.bias;
    if (tile.has_relu) value = relu(value);
    if (tile.lanes < kVectorWidth) {
      store_some(tile.out + i * tile.out_step, value, tile.lanes);
    } else {
      store(tile.out + i * tile.out_step, value);
    }
  }
}

using NarrowKernel = void (*)(const NarrowTile&);

struct NarrowKernels {
  NarrowKernel by_rows[kMicroRows + 1] = {};
  constexpr NarrowKernels() { fill<kMicroRows>(); }
  template <int Rows>
  constexpr void fill() {
    by_rows[Rows] = narrow_kernel<Rows>;
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
};

constexpr NarrowKernels kNarrow;

// Output rows [p0, p0 + rows) of image n, from their strip.
static void run_narrow(const Conv2dProblem& problem, int64_t n, int64_t p0, int64_t rows, const float* strip) {
  const Conv2dGeometry& g = problem.geometry;
  const int64_t channels = problem.group_out, values = problem.out.w * channels, phases = problem.narrow_phases;
  const int64_t step = g.stride_w * problem.group_in;  // of the strip, from one output pixel to the next
  const int64_t run = g.filter_w * problem.group_in, reduction = g.filter_h * run, pitch = problem.strip_pitch;
  const int64_t tiles = (rows + kMicroRows - 1) / kMicroRows;
  alignas(64) float inputs[kNarrowBytes / 4];
  NarrowTile tile;
  tile.inputs = inputs;
  tile.down = g.dilation_h * kVectorWidth;
  tile.runs = g.filter_h;
  tile.run = run;
  tile.row_step = g.stride_h * kVectorWidth;
  tile.has_relu = problem.relu;
  tile.out_step = values;
  int64_t row = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t height = (rows - row + tiles - t - 1) / (tiles - t), input_rows = problem.input_rows(height);
    float* out = static_cast<float*>(problem.out.data) + (n * problem.out.h + p0 + row) * values;
    const float* from = strip + row * g.stride_h * pitch;
    tile.column = input_rows * kVectorWidth;
    for (int64_t phase = 0; phase < phases; ++phase) {
      const float* table = problem.narrow_table + phase * (reduction + kNarrowExtraRows) * kVectorWidth;
      tile.weights = table;
      tile.scale = load(table + reduction * kVectorWidth);
      tile.bias = load(table + (reduction + 1) * kVectorWidth);
      const Words index = reinterpret_cast<Words>(load(table + (reduction + 2) * kVectorWidth));
      int64_t first = phase * kVectorWidth / channels;  // pixel
      for (int64_t at = phase * kVectorWidth; at < values; at += phases * kVectorWidth) {
        float* to = inputs;
        for (int64_t k = 0; k < run; ++k) {
          const float* value = from + first * step + k;
          for (int64_t h = 0; h < input_rows; ++h, value += pitch, to += kVectorWidth) {
            store(to, permuted(load(value), index));
          }
        }
        tile.out = out + at;
        tile.lanes = values - at;
        kNarrow.by_rows[height](tile);
        first += phases * kVectorWidth / channels;
      }
    }
    row += height;
  }
}

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
