// Dot products of few input rows and some weight rows, in tiles: isa/linear.cpp says how they are used.
//
// Registers: a tile's accumulators (kTileRows x 4, or 1 x 8), its weight vectors, one input.
#pragma once

#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6;
#elif defined(__AVX2__)
constexpr int kTileRows = 3;
#else
constexpr int kTileRows = 2;
#endif
constexpr int kTileColumns = 4;
constexpr int kRowTileColumns = 8;  // of a single row, whose sums would wait for each other

// A tile of dot products over `count` values, each left as a vector of partial sums.
template <int Rows, int Columns, typename T>
static void dot_products(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t count, float* sums,
                         bool resume) {
  Vector sum[Rows][Columns];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) sum[i][j] = resume ? load(sums + (i * Columns + j) * kVectorWidth) : Vector{};
  }
  int64_t c = 0;
  for (; c + kVectorWidth <= count; c += kVectorWidth) {
    Vector weight[Columns];
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) weight[j] = load(w + j * w_stride + c);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vector value = load(x + i * x_stride + c);
#pragma GCC unroll 8
      for (int j = 0; j < Columns; ++j) sum[i][j] += value * weight[j];
    }
  }
  if (c < count) {
    for (int i = 0; i < Rows; ++i) {
      const Vector value = load_some(x + i * x_stride + c, count - c);
      for (int j = 0; j < Columns; ++j) sum[i][j] += value * load_some(w + j * w_stride + c, count - c);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) store(sums + (i * Columns + j) * kVectorWidth, sum[i][j]);
  }
}

template <typename T>
using DotProducts = void (*)(const T*, int64_t, const T*, int64_t, int64_t, float*, bool);

// By the number of input rows; full tiles of columns, and single columns for what is left over.
template <typename T, int Columns>
struct DotKernels {
  DotProducts<T> by_rows[kTileRows + 1] = {};
  constexpr DotKernels() { fill<kTileRows>(); }
  template <int Rows>
  constexpr void fill() {
    by_rows[Rows] = dot_products<Rows, Columns, T>;
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
};

template <typename T>
struct Dot {
  static constexpr DotKernels<T, kTileColumns> full{};
  static constexpr DotKernels<T, 1> single{};

  static DotProducts<T> kernel(int64_t rows, int64_t columns) {
    if (columns == kRowTileColumns) return dot_products<1, kRowTileColumns, T>;
    return (columns == 1 ? single.by_rows : full.by_rows)[rows];
  }
};

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
