// F(4x4, 3x3) from one or two vectors of channels to one or two: the first stages of networks for small pictures.
// conv2d_winograd.cpp has the formula; the sums are the same, term by term, so results have the bits of its other path.
//
// With so few channels a point's products of a micro-tile take a hundred cycles: what is done once a point (a call, its
// addresses, what to fetch ahead) counts, and so do the transforms, whose stores each need an address of their own
// unless points lie at constant distances.
//
// Layouts, with L lanes to a vector, I and K vectors of channels in and out, and kFewTiles tiles whatever their number:
//   transformed input  [point][I][kFewTiles][L]    products  [point][kFewTiles][K][L]
// both with points padded apart to an odd number of vectors; weights as in conv2d_winograd.cpp.
//
// Work: the tasks are those of conv2d_winograd.cpp; here a task goes through its block in groups of up to kFewTiles
// tiles: there, the products of all points in one loop, and back. What lies between stays in L1 or near it (AVX-512:
// 18 KiB a vector of channels, in and out); weights come from L2, once a group.
#pragma once

#include "conv2d_winograd.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kFewTiles = kMicroRows >= 12 ? 8 : 4;  // as many as leave their sums, two vectors a tile, in registers
constexpr int kFewVectors = 2;                       // at most, of channels: fewer than are summed in chunks
constexpr int kFewSide = 6, kFewPoints = kFewSide * kFewSide, kFewOutputs = 4;

constexpr int64_t few_point_stride(int vectors) {
  return (vectors * kFewTiles | 1) * kVectorWidth;
}

static bool has_few_channels(const WinogradProblem& problem) {
  const auto few = [](const TensorView& x) {
    return x.dtype == DType::f32 && x.c % kVectorWidth == 0 && x.c <= kFewVectors * kVectorWidth;
  };
  return problem.tile == kFewOutputs && problem.side == kFewSide && problem.stride == 1 && !problem.max_pool &&
         few(problem.input) && few(problem.out);
}

static int64_t few_scratch_bytes(const WinogradProblem& problem) {
  const int in = static_cast<int>(problem.input.c / kVectorWidth), out = static_cast<int>(problem.out.c / kVectorWidth);
  return kFewPoints * (few_point_stride(in) + few_point_stride(out)) * 4;
}

// All points' products of a group of `Tiles` tiles.
template <int Tiles, int Out>
static void multiply_few(const float* panel, int64_t vectors, int64_t panel_stride, const float* weight,
                         float* products) {
  for (int point = 0; point < kFewPoints; ++point, panel += panel_stride, products += few_point_stride(Out)) {
    Vector sum[Tiles][Out];
#pragma GCC unroll 8
    for (int i = 0; i < Tiles; ++i) {
#pragma GCC unroll 2
      for (int k = 0; k < Out; ++k) sum[i][k] = Vector{};
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const float* from = panel + v * kFewTiles * kVectorWidth;
#pragma GCC unroll 4
      for (int lane = 0; lane < kVectorWidth; ++lane, weight += kColumnBlock) {
        Vector w[Out];
#pragma GCC unroll 2
        for (int k = 0; k < Out; ++k) w[k] = load(weight + k * kVectorWidth);
#pragma GCC unroll 8
        for (int i = 0; i < Tiles; ++i) {
          const Vector x = broadcast(from[i * kVectorWidth + lane]);
#pragma GCC unroll 2
          for (int k = 0; k < Out; ++k) sum[i][k] += x * w[k];
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Tiles; ++i) {
#pragma GCC unroll 2
      for (int k = 0; k < Out; ++k) store(products + (i * Out + k) * kVectorWidth, sum[i][k]);
    }
  }
}

template <int Out>
struct FewKernels {
  using Multiply = void (*)(const float*, int64_t, int64_t, const float*, float*);
  Multiply by_tiles[kFewTiles + 1] = {};
  constexpr FewKernels() { fill<kFewTiles>(); }
  template <int Tiles>
  constexpr void fill() {
    by_tiles[Tiles] = multiply_few<Tiles, Out>;
    if constexpr (Tiles > 1) fill<Tiles - 1>();
  }
};
template <int Out>
constexpr FewKernels<Out> kFewKernels;

template <int In>
static void transform_few(const WinogradProblem& problem, const TileBlock& tiles, float* panel) {
  TilePlace place = place_of(problem, tiles.first);
  for (int64_t i = 0; i < tiles.count; ++i, place = place_after(problem, place)) {
    for (int v = 0; v < In; ++v) {
      float* to = panel + (v * kFewTiles + i) * kVectorWidth;
      transform_vector<float, kFewSide>(problem, place, v * kVectorWidth,
                                        [&](int row, int column, Vector value) __attribute__((always_inline)) {
                                          store(to + (row * kFewSide + column) * few_point_stride(In), value);
                                        });
    }
  }
}

// What all tiles' way back needs, held apart from the problem: a store of a vector may be to that, as far as the
// compiler knows.
struct FewOutput {
  float* data;
  const float* residual;
  int64_t column, row, residual_column, residual_row;  // floats from one pixel or row to the next
  Vector least;                                        // of values: zero or minus infinity
};

// One vector of a tile that lies inside the output.
template <int Out, bool Residual>
static inline void finish_few(const FewOutput& y, int64_t pixel, int64_t channel, Vector scale, Vector bias,
                              const float* products) {
  Vector half[kFewOutputs][kFewSide];
  transform_columns<kFewOutputs, kFewSide>(products, few_point_stride(Out), half);
  float* out = y.data + pixel * y.column + channel;
  const float* residual = Residual ? y.residual + pixel * y.residual_column + channel : nullptr;
#pragma GCC unroll 4
  for (int i = 0; i < kFewOutputs; ++i) {
    Vector across[kFewOutputs];
    Points<kFewSide>::output(half[i], across);
#pragma GCC unroll 4
    for (int j = 0; j < kFewOutputs; ++j) {
      Vector value = across[j] * scale + bias;
      if constexpr (Residual) value += load(residual + i * y.residual_row + j * y.residual_column);
      store(out + i * y.row + j * y.column, at_least(value, y.least));
    }
  }
}

template <int Out, bool Residual>
static void finish_group(const WinogradProblem& problem, const TileBlock& tiles, const float* products) {
  const TensorView &out = problem.out, &added = problem.residual;
  const FewOutput y = {static_cast<float*>(out.data),
                       static_cast<const float*>(added.data),
                       out.pixel_stride,
                       out.w * out.pixel_stride,
                       added.pixel_stride,
                       out.w * added.pixel_stride,
                       problem.relu ? Vector{} : broadcast(-__builtin_inff())};
  const int64_t height = out.h, width = out.w;
  Vector scale[Out], bias[Out];
  for (int k = 0; k < Out; ++k) {
    scale[k] = load(problem.scale + k * kVectorWidth);
    bias[k] = load(problem.bias + k * kVectorWidth);
  }
  TilePlace place = place_of(problem, tiles.first);
  for (int64_t i = 0; i < tiles.count; ++i, place = place_after(problem, place)) {
    const bool inside = place.height == kFewOutputs && place.p + kFewOutputs <= height && place.width == kFewOutputs &&
                        place.q + kFewOutputs <= width;
    const int64_t pixel = (place.image * height + place.p) * width + place.q;
    for (int k = 0; k < Out; ++k) {
      const int64_t channel = k * kVectorWidth;
      const float* from = products + (i * Out + k) * kVectorWidth;
      if (inside) {
        finish_few<Out, Residual>(y, pixel, channel, scale[k], bias[k], from);
      } else {
        transform_output<float, kFewOutputs, kFewSide>(problem, place, channel, kVectorWidth, scale[k], bias[k], from,
                                                       few_point_stride(Out));
      }
    }
  }
}

template <int In, int Out>
static void run_few(const WinogradProblem& problem, int64_t index, float* panel) {
  const TileBlock block = tile_block(problem, index);
  float* products = panel + kFewPoints * few_point_stride(In);
  const int64_t groups = (block.count + kFewTiles - 1) / kFewTiles;
  for (int64_t group = 0, at = 0; group < groups; ++group) {
    const TileBlock tiles = {block.first + at, (block.count - at + groups - group - 1) / (groups - group)};
    at += tiles.count;
    transform_few<In>(problem, tiles, panel);
    kFewKernels<Out>.by_tiles[tiles.count](panel, In, few_point_stride(In), problem.packed_weight, products);
    if (problem.residual) {
      finish_group<Out, true>(problem, tiles, products);
    } else {
      finish_group<Out, false>(problem, tiles, products);
    }
  }
}

// Tasks are blocks of tiles: there is but one column block.
static void run_few(const WinogradProblem& problem, int64_t index, float* scratch) {
  const bool two_in = problem.input.c > kVectorWidth, two_out = problem.out.c > kVectorWidth;
  if (two_in) {
    two_out ? run_few<2, 2>(problem, index, scratch) : run_few<2, 1>(problem, index, scratch);
  } else {
    two_out ? run_few<1, 2>(problem, index, scratch) : run_few<1, 1>(problem, index, scratch);
  }
}

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
