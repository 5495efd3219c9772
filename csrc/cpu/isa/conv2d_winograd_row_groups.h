// Products of Winograd along rows with stride 1 (conv2d_winograd_rows.cpp) into at most a vector of output channels:
// several output rows at a time.
//
//   sums[row][tile][k] = sum_{r,c} panel[row + r][tile][c] * weight[r][c][k]
//
// With one vector of channels each product of the general micro-kernel loads its own input value, and loading is what
// it waits for. Output rows share most of their input rows: here a value that was loaded is multiplied by the weights
// of as many filter rows as there are output rows that read it. Each sum is formed in the general kernel's order.
//
// Kept in registers: up to 4 rows (of 16 registers: 2) x 5 tiles of sums, a weight for each row, one broadcast.
#pragma once

#include "table.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kGroupRows = kVectorWidth == 16 ? 4 : 2, kGroupTiles = 5, kGroupTaps = 5;

struct RowGroup {
  const float* panel;  // of a point, at the first row and tile
  int64_t row_stride;  // of the panel
  int64_t words;       // of a filter row
  const float* weight;
  float* sums;
  int64_t sums_row_stride;
};

// Input row `Row` of the group and those behind it; what they bring to output rows Row - 4 to Row.
template <int Rows, int Tiles, int kPitch, int Row = 0>
static inline __attribute__((always_inline)) void add_input_rows(const RowGroup& group, Vector (&sum)[Rows][Tiles]) {
  constexpr int kFirst = Row < kGroupTaps ? 0 : Row - kGroupTaps + 1, kLast = Row < Rows ? Row : Rows - 1;
  const float* x = group.panel + Row * group.row_stride;
  const float* weight = group.weight;
  const int64_t words = group.words;
  for (int64_t c = 0; c < words; ++c, ++x, weight += kColumnBlock) {
    Vector w[Rows];
#pragma GCC unroll 4
    for (int i = kFirst; i <= kLast; ++i) w[i] = load(weight + (Row - i) * words * kColumnBlock);
#pragma GCC unroll 5
    for (int tile = 0; tile < Tiles; ++tile) {
      const Vector value = broadcast(x[tile * kPitch]);
#pragma GCC unroll 4
      for (int i = kFirst; i <= kLast; ++i) sum[i][tile] += value * w[i];
    }
  }
  if constexpr (Row + 1 < Rows + kGroupTaps - 1) add_input_rows<Rows, Tiles, kPitch, Row + 1>(group, sum);
}

template <int Rows, int Tiles, int kPitch>
static void row_group_kernel(const RowGroup& group) {
  Vector sum[Rows][Tiles];
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 5
    for (int tile = 0; tile < Tiles; ++tile) sum[i][tile] = Vector{};
  }
  add_input_rows<Rows, Tiles, kPitch>(group, sum);
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 5
    for (int tile = 0; tile < Tiles; ++tile) {
      store(group.sums + i * group.sums_row_stride + tile * kVectorWidth, sum[i][tile]);
    }
  }
}

using RowGroupKernel = void (*)(const RowGroup&);

template <int kPitch>
struct RowGroupKernels {
  RowGroupKernel by_size[kGroupRows + 1][kGroupTiles + 1] = {};
  constexpr RowGroupKernels() { fill<kGroupTiles>(); }
  template <int Tiles>
  constexpr void fill() {
    by_size[1][Tiles] = row_group_kernel<1, Tiles, kPitch>;
    by_size[2][Tiles] = row_group_kernel<2, Tiles, kPitch>;
    by_size[kGroupRows][Tiles] = row_group_kernel<kGroupRows, Tiles, kPitch>;
    if constexpr (Tiles > 1) fill<Tiles - 1>();
  }
};

template <int kPitch>
constexpr RowGroupKernels<kPitch> kRowGroups;

// The products of `rows` output rows of `tiles` tiles at one point.
template <int kPitch>
static void multiply_row_groups(RowGroup group, int64_t rows, int64_t tiles) {
  const float* panel = group.panel;
  float* sums = group.sums;
  const int64_t parts = (tiles + kGroupTiles - 1) / kGroupTiles;
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row, height = left >= kGroupRows ? kGroupRows : left >= 2 ? 2 : 1;
    int64_t tile = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t width = (tiles - tile + parts - part - 1) / (parts - part);
      group.panel = panel + row * group.row_stride + tile * kPitch;
      group.sums = sums + row * group.sums_row_stride + tile * kVectorWidth;
      kRowGroups<kPitch>.by_size[height][width](group);
      tile += width;
    }
    row += height;
  }
}

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
