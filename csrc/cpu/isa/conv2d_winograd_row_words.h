// Products of Winograd along rows (conv2d_winograd_rows.cpp) with stride 2 over three channels, as of first layers: six
// words to a filter row, three at infinity.
//
//   sums[tile][k] = sum_{r,c} panel[r][tile][c] * weight[r][c][k]
//
// The general micro-kernel begins anew with each filter row, every six words: here these are unrolled. All points'
// products of a micro-tile are formed one after the other, and transformed back before the next micro-tile's.
//
// Kept in registers: 6 tiles x 2 vectors of sums, two weight vectors, one broadcast. In L1: a column block's weights of
// all points (at 7 points 18 KB), a micro-tile's input and sums.
#pragma once

#include "table.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

// Where it pays: with 14 tiles in registers a filter row is long enough.
constexpr bool kRowWords = kVectorWidth == 8;
constexpr int kRowWordsWhole = 6, kRowWordsHalf = 3;  // words of a filter row
constexpr int64_t kRowWordsBytes = 20 << 10;          // most weights of a column block
constexpr int kRowWordsChunk = 24;                    // words that are summed without a break

struct RowWords {
  const float* panel;  // of a point, at the first tile
  int64_t row_stride, phase_stride;
  int filter;
  const float* weight;
  float* sums;  // [tile][kColumnBlock]
};

// The two phases of a row take turns as the filter's rows.
static inline bool has_row_words(const WinogradRowsProblem& problem) {
  const int64_t words = problem.filter * ((problem.side - 1) * problem.words + problem.last_words);
  return kRowWords && problem.stride == 2 && problem.words == kRowWordsWhole && problem.last_words == kRowWordsHalf &&
         words * kColumnBlock * 4 <= kRowWordsBytes && problem.out.dtype == DType::f32 &&
         problem.out.c % kVectorWidth == 0;
}

template <int Tiles, int Words>
static void row_words_kernel(const RowWords& p) {
  constexpr int kChunkRows = kRowWordsChunk / Words;
  constexpr int kLine = 16;
  const float *weight = p.weight, *from = p.panel, *next = p.panel + p.phase_stride;
  float* const sums = p.sums;
  const int64_t row_stride = p.row_stride;
  const int filter = p.filter;
  for (int row = 0; row < filter;) {
    Vector sum[Tiles][kMicroVectors] = {};
    const int end = filter - row < kChunkRows ? filter : row + kChunkRows;
    const bool begun = row > 0;
    for (; row < end; ++row) {
#pragma GCC unroll 4
      for (int at = 0; at < Tiles * kVectorWidth; at += kLine) __builtin_prefetch(next + at, 0, 3);
#pragma GCC unroll 6
      for (int word = 0; word < Words; ++word) {
        // Keeps the compiler from mixing steps, for which it has too few registers.
        __asm__("" : "+r"(from), "+r"(weight));
        const Vector w[2] = {load(weight), load(weight + kVectorWidth)};
        weight += kColumnBlock;
#pragma GCC unroll 6
        for (int i = 0; i < Tiles; ++i) {
          const Vector x = broadcast(from[i * kVectorWidth + word]);
          add_product(sum[i][0], x, w[0]);
          add_product(sum[i][1], x, w[1]);
        }
      }
      const float* after = from + row_stride;
      from = next;
      next = after;
    }
#pragma GCC unroll 6
    for (int i = 0; i < Tiles; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kMicroVectors; ++j) {
        float* to = sums + i * kColumnBlock + j * kVectorWidth;
        store(to, begun ? load(to) + sum[i][j] : sum[i][j]);
      }
    }
  }
}

template <int Words>
struct RowWordsKernels {
  void (*by_tiles[kMicroRows + 1])(const RowWords&) = {};
  constexpr RowWordsKernels() { fill<kRowWords ? kMicroRows : 0>(); }
  template <int Tiles>
  constexpr void fill() {
    if constexpr (Tiles > 0) {
      by_tiles[Tiles] = row_words_kernel<Tiles, Words>;
      fill<Tiles - 1>();
    }
  }
};

constexpr RowWordsKernels<kRowWordsWhole> kWholeRowWords;
constexpr RowWordsKernels<kRowWordsHalf> kHalfRowWords;

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
