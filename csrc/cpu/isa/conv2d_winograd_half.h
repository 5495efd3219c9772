// The products of conv2d_winograd_plain.cpp where weights are so few that twice as many stay in the caches: these are
// transformed along filter rows when they are packed, and along columns in registers.
//
// That leaves a third of the arithmetic on weights, and a pass may take one column of points instead of a pair. So it
// takes two vectors of output channels, which share each broadcast of the input: 18 loads for 24 products where the
// plain weights' passes need 33. Values and sums are theirs, in the same order. What comes next of the weights the
// processor fetches by itself: asking for it made a frozen ResNet-20 slower.
//
// Layouts, with L lanes to a vector:
//   weights   [pair of vectors of output channels][chunk][column of points][channel][filter row][2][L]
//   products  [2][point][tile][L]
//
// Kept in registers: the sums of 3 points x kTilesAtOnce tiles x 2 vectors, the transformed weights of one channel.
#pragma once

#include "conv2d_winograd_plain.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kPair = 2;

struct HalfPass {
  const float* panel;  // at the first point, chunk and tile
  int64_t panel_row, vector_stride;
  const float* weight;
  int64_t vectors;  // of channels
  float* sums;
  int64_t sums_row, sums_vector;
  bool add;  // to what earlier chunks left in `sums`
};

template <int Half, int Tiles>
static void run_half_pass(const HalfPass& pass) {
  Vector sum[3][Tiles][kPair];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 4
    for (int t = 0; t < Tiles; ++t) sum[i][t][0] = sum[i][t][1] = Vector{};
  }
  const float* weight = pass.weight;
  const float* panel = pass.panel;
  for (int64_t v = 0; v < pass.vectors; ++v, panel += pass.vector_stride) {
    const float* x[3] = {panel, panel + pass.panel_row, panel + 2 * pass.panel_row};
    for (int64_t lane = 0; lane < kVectorWidth; ++lane) {
      // `rounded` holds values in registers: the compiler would load some again with each product.
      const auto row = [&](int r, int k) __attribute__((always_inline)) {
        return rounded(load(weight + (r * kPair + k) * kVectorWidth));
      };
      const auto multiply = [&](int i, Vector u0, Vector u1) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int t = 0; t < Tiles; ++t) {
          const Vector value = rounded(broadcast(x[i][t * kVectorWidth + lane]));
          sum[i][t][0] += value * u0;
          sum[i][t][1] += value * u1;
        }
      };
      Vector plus[kPair], minus[kPair];
#pragma GCC unroll 2
      for (int k = 0; k < kPair; ++k) transform_pair<Half>(row(0, k), row(1, k), row(2, k), plus[k], minus[k]);
      multiply(1 - Half, plus[0], plus[1]);
      multiply(2 - Half, minus[0], minus[1]);
      multiply(2 * Half, row(2 * Half, 0), row(2 * Half, 1));
      weight += 3 * kPair * kVectorWidth;
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 4
    for (int t = 0; t < Tiles; ++t) {
#pragma GCC unroll 2
      for (int k = 0; k < kPair; ++k) {
        float* to = pass.sums + i * pass.sums_row + k * pass.sums_vector + t * kVectorWidth;
        store(to, pass.add ? load(to) + sum[i][t][k] : sum[i][t][k]);
      }
    }
  }
}

using RunHalfPass = void (*)(const HalfPass&);

struct HalfPasses {
  RunHalfPass by_tiles[2][kTilesAtOnce + 1] = {};  // [half of the rows][tiles]
  constexpr HalfPasses() { fill<kTilesAtOnce>(); }
  template <int Tiles>
  constexpr void fill() {
    by_tiles[0][Tiles] = run_half_pass<0, Tiles>;
    by_tiles[1][Tiles] = run_half_pass<1, Tiles>;
    if constexpr (Tiles > 1) fill<Tiles - 1>();
  }
};
constexpr HalfPasses kHalfPasses;

// A chunk of channel vectors from `vector` of the panel on: all points, added to `products`.
static void multiply_half_chunk(const WinogradProblem& problem, int64_t tiles, const float* panel, int64_t vector,
                                int64_t count, const float* weight, bool add, float* products) {
  const int64_t panel_stride = input_point_stride(problem), product_stride = plain_product_stride(problem);
  const int64_t groups = (tiles + kTilesAtOnce - 1) / kTilesAtOnce;
  const int64_t column_values = count * kVectorWidth * 3 * kPair * kVectorWidth;
  HalfPass pass;
  pass.panel_row = kSide * panel_stride;
  pass.vector_stride = tiles * kVectorWidth;
  pass.vectors = count;
  pass.sums_row = kSide * product_stride;
  pass.sums_vector = kPointCount * product_stride;
  pass.add = add;
  for (int column = 0; column < kSide; ++column, weight += column_values) {
    pass.weight = weight;
    for (int half = 0; half < 2; ++half) {
      const int point = 3 * half * kSide + column;
      int64_t tile = 0;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t height = (tiles - tile + groups - group - 1) / (groups - group);
        pass.panel = panel + point * panel_stride + vector * pass.vector_stride + tile * kVectorWidth;
        pass.sums = products + point * product_stride + tile * kVectorWidth;
        kHalfPasses.by_tiles[half][height](pass);
        tile += height;
      }
    }
  }
}

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
