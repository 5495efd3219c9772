// Winograd convolution F(4x4, 3x3) with groups no wider than a vector of channels, as many outputs as inputs (ResNeXt).
//
// The formula and the points are those of conv2d_winograd.cpp; which lanes meet, with G channels a group, is said in
// conv2d_grouped.cpp: lane l of a vector of output channels needs channel (l / G) * G + j of the same vector of input
// channels, for j = 0 .. G-1. So a vector of channels is a convolution of its own, from its input to its output:
//
//   products[point][tile][l] = sum_j transformed input[point][tile][(l / G) * G + j] * transformed weights[point][j][l]
//
// Layouts, with L lanes to a vector:
//   weights              [vector of channels][j][filter row][filter column][L], plain: as conv2d_winograd_plain.cpp
//                        stores them, those with an index 1 times 5/8
//   transformed weights  [point][j][L]
//   panel                [point][tile][L]: of up to kTilesAtOnce tiles the transformed input, then the products
//
// Work: a task owns some tiles x a few vectors of channels. For each of these it transforms the weights (a few hundred
// cycles, for many tiles; stored transformed they would be 4 times as large), then tiles, kTilesAtOnce at a time:
// there, multiplied in place, and back.
//
// Kept in registers: a point's sums of all tiles of a panel. In L1: the panel and most of the weights.
//
// Floor: 2*36*tiles*C*G FLOPs at the FMA rate, and a permutation with each product, which takes a unit that multiplies
// as well; a broadcast from memory where the group is a whole vector.
#include "conv2d_spread.h"
#include "conv2d_winograd.h"
#include "variant.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kSide = 6;
constexpr int kPointCount = kSide * kSide;
constexpr int kTaps = 9;
constexpr int kTilesAtOnce = kMicroRows >= 12 ? 8 : 4;
constexpr int64_t kPointStride = (kTilesAtOnce + 1) * kVectorWidth;  // of a panel

// ---- weights --------------------------------------------------------------------------------------------------------

// The filter's values at the points, for a column or row of three taps, the middle one of which carries 5/8.
static inline void transform_taps(const Vector (&w)[3], Vector (&u)[kSide]) {
  constexpr float pp = Points<6>::pp, qq = Points<6>::qq, ratio = Points<6>::q / Points<6>::p;
  constexpr float zero = 1 / (pp * qq), near = 1 / (2 * pp * (pp - qq)), far = 1 / (2 * qq * (qq - pp));
  const Vector even_p = w[0] + pp * w[2], even_q = w[0] + qq * w[2], odd_q = ratio * w[1];
  u[0] = zero * w[0];
  u[1] = near * (even_p + w[1]);
  u[2] = near * (even_p - w[1]);
  u[3] = far * (even_q + odd_q);
  u[4] = far * (even_q - odd_q);
  u[5] = w[2];
}

static void transform_weights(const float* weight, int64_t group, float* to) {
  const int64_t point_stride = group * kVectorWidth;
  for (int64_t j = 0; j < group; ++j, weight += kTaps * kVectorWidth, to += kVectorWidth) {
    Vector down[3][kSide];  // [filter column][point]
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) {
      const Vector column[3] = {load(weight + s * kVectorWidth), load(weight + (3 + s) * kVectorWidth),
                                load(weight + (6 + s) * kVectorWidth)};
      transform_taps(column, down[s]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kSide; ++i) {
      const Vector row[3] = {down[0][i], down[1][i], down[2][i]};
      Vector u[kSide];
      transform_taps(row, u);
#pragma GCC unroll 6
      for (int k = 0; k < kSide; ++k) store(to + (i * kSide + k) * point_stride, u[k]);
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// What is asked for meanwhile, a pixel of each tile with each point: the input of the panel that follows, and the
// outputs of this one. Pixels of one vector of channels lie too far apart for the processor to see what comes next.
struct PixelsAhead {
  const char* in[kTilesAtOnce];
  const char* out[kTilesAtOnce];
  int64_t in_offsets[kPointCount], out_offsets[kPointCount];  // the latter of 16 pixels, then of the first again

  PixelsAhead(const WinogradProblem& problem) {
    const TensorView &x = problem.input, &y = problem.out;
    const int64_t in_pixel = x.pixel_stride * size_in_bytes(x.dtype),
                  out_pixel = y.pixel_stride * size_in_bytes(y.dtype);
    for (int i = 0; i < kPointCount; ++i) {
      in_offsets[i] = (i / kSide * x.w + i % kSide) * in_pixel;
      out_offsets[i] = i < 16 ? (i / 4 * y.w + i % 4) * out_pixel : 0;
    }
  }
  // Tiles of up to a panel from `places` on. The addresses may lie outside of the tensors: nothing is read.
  void aim(const char* (&at)[kTilesAtOnce], const TensorView& x, const TilePlace* places, int64_t count, int64_t row,
           int64_t column, int64_t channel) {
    for (int64_t t = 0; t < kTilesAtOnce; ++t) {
      const TilePlace& place = places[t < count ? t : count - 1];
      const int64_t pixel = (place.image * x.h + place.p - row) * x.w + place.q - column;
      const int64_t bytes = (pixel * x.pixel_stride + channel) * size_in_bytes(x.dtype);
      at[t] = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(x.data) + static_cast<uintptr_t>(bytes));
    }
  }
};

// The tiles of a panel, in place.
template <int Group, int Tiles>
static void multiply_panel(const float* weights, float* panel, const PixelsAhead& ahead) {
  for (int point = 0; point < kPointCount; ++point, panel += kPointStride) {
    const int64_t in_offset = ahead.in_offsets[point], out_offset = ahead.out_offsets[point];
#pragma GCC unroll 8
    for (int t = 0; t < Tiles; ++t) {
      __builtin_prefetch(ahead.in[t] + in_offset, 0, 3);
      __builtin_prefetch(ahead.out[t] + out_offset, 1, 3);
    }
    Vector sum[Tiles], x[Tiles];
#pragma GCC unroll 8
    for (int t = 0; t < Tiles; ++t) {
      sum[t] = Vector{};
      if constexpr (Group < kVectorWidth) x[t] = load(panel + t * kVectorWidth);
    }
#pragma GCC unroll 16
    for (int j = 0; j < Group; ++j, weights += kVectorWidth) {
      const Vector w = load(weights);
#pragma GCC unroll 8
      for (int t = 0; t < Tiles; ++t) {
        if constexpr (Group < kVectorWidth) {
          sum[t] += spread<Group>(x[t], j) * w;
        } else {
          sum[t] += broadcast(panel[t * kVectorWidth + j]) * w;
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tiles; ++t) store(panel + t * kVectorWidth, sum[t]);
  }
}

using Multiply = void (*)(const float*, float*, const PixelsAhead&);

template <int Group>
struct Multiplies {
  Multiply by_tiles[kTilesAtOnce + 1] = {};
  constexpr Multiplies() { fill<kTilesAtOnce>(); }
  template <int Tiles>
  constexpr void fill() {
    by_tiles[Tiles] = multiply_panel<Group, Tiles>;
    if constexpr (Tiles > 1) fill<Tiles - 1>();
  }
};

template <int Group>
constexpr Multiplies<Group> kMultiplies;

static const Multiply* multiplies_of(int64_t group) {
  switch (group) {
    case 4:
      return kMultiplies<4>.by_tiles;
    case 8:
      if constexpr (kVectorWidth >= 8) return kMultiplies<8>.by_tiles;
      return nullptr;
    default:
      if constexpr (kVectorWidth >= 16) return kMultiplies<16>.by_tiles;
      return nullptr;
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// Up to kTilesAtOnce adjacent tiles.
struct Panel {
  TilePlace places[kTilesAtOnce];
  int64_t count;

  // Panel `index` of `panels` of nearly equal size.
  Panel(const WinogradProblem& problem, const TileBlock& tiles, int64_t index, int64_t panels) {
    const int64_t first = index * tiles.count / panels;
    count = (index + 1) * tiles.count / panels - first;
    places[0] = place_of(problem, tiles.first + first);
    for (int64_t t = 1; t < count; ++t) places[t] = place_after(problem, places[t - 1]);
  }
};

template <typename T>
static void run_columns(const WinogradProblem& problem, const TileBlock& tiles, int64_t first, int64_t last,
                        int64_t group, float* panel_values, float* weights) {
  const Multiply* multiply = multiplies_of(group);
  const int64_t panels = (tiles.count + kTilesAtOnce - 1) / kTilesAtOnce;
  PixelsAhead ahead(problem);
  for (int64_t column = first; column < last; ++column) {
    transform_weights(problem.packed_weight + column * group * kTaps * kVectorWidth, group, weights);
    const int64_t channel = column * kVectorWidth, lanes = problem.out.c - channel;
    const Vector scale = load(problem.scale + channel), bias = load(problem.bias + channel);
    for (int64_t k = 0; k < panels; ++k) {
      const Panel panel(problem, tiles, k, panels);
      for (int64_t t = 0; t < panel.count; ++t) {
        float* to = panel_values + t * kVectorWidth;
        const auto put = [&](int i, int j, Vector value)
                             __attribute__((always_inline)) { store(to + (i * kSide + j) * kPointStride, value); };
        transform_vector<T, kSide>(problem, panel.places[t], channel, put);
      }
      const bool more = k + 1 < panels;
      const Panel next(problem, tiles, more ? k + 1 : 0, panels);
      ahead.aim(ahead.in, problem.input, next.places, next.count, problem.pad_top, problem.pad_left,
                more ? channel : channel + kVectorWidth);
      ahead.aim(ahead.out, problem.out, panel.places, panel.count, 0, 0, channel);
      multiply[panel.count](weights, panel_values, ahead);
      for (int64_t t = 0; t < panel.count; ++t) {
        transform_output<T, 4, kSide>(problem, panel.places[t], channel, lanes, scale, bias,
                                      panel_values + t * kVectorWidth, kPointStride);
      }
    }
  }
}

}  // namespace

int64_t winograd_grouped_scratch_bytes(const WinogradProblem& problem) {
  const int64_t group = problem.input.c / problem.groups;
  return kPointCount * (kPointStride + group * kVectorWidth) * 4;
}

// Tasks: (tile block, part of the vectors of channels), the latter fastest: layers before and after share out pixels.
void winograd_grouped_task(const WinogradProblem& problem, int64_t index, void* scratch) {
  const int64_t parts = (problem.column_blocks + problem.columns_per_task - 1) / problem.columns_per_task;
  const int64_t first = index % parts * problem.columns_per_task;
  const int64_t beyond = first + problem.columns_per_task;
  const int64_t last = beyond < problem.column_blocks ? beyond : problem.column_blocks;
  const TileBlock tiles = tile_block(problem, index / parts);
  const int64_t group = problem.input.c / problem.groups;
  float* panel = static_cast<float*>(scratch);
  float* weights = panel + kPointCount * kPointStride;
  const auto run = problem.out.dtype == DType::f32 ? run_columns<float> : run_columns<uint16_t>;
  run(problem, tiles, first, last, group, panel, weights);
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
