// Winograd convolution F(4x4, 3x3) with weights that are stored plain and transformed in registers, each time they are
// used. For few tiles, where reading 36 transformed values for 9 weights takes longer than to transform them; and for
// groups of whole vectors of channels.
//
// The formula and the points are those of conv2d_winograd.cpp. A row of the filters' transform G belongs to a finite
// point v and is 1/N(v) times (1, v, v*v), N being the product of v's distances to the other points: here weights are
// transformed without 1/N(v), and the transformed input carries 1/N(v) 1/N(v'). What is left are sums and two factors,
// as points come in pairs +-v: with e = w0 + v*v*w2 and o = v*w1 they are e + o and e - o. Weights with an index 1 are
// stored times 5/8, the smaller v, so that o is w1 itself.
//
// Layouts, with L lanes to a vector:
//   transformed input  [tile block][point][channel vector][tile][L], as in conv2d_winograd.cpp
//   weights            [vector of output channels][channel of its group][filter row][filter column][L]
//   products           [point][tile][L], of one tile block and one vector of output channels
//
// Work: a task is a block of tiles and some vectors of output channels. For each of these vectors and for chunks of
// kChunkVectors channel vectors, six passes form the products of six points each: a pair of columns (0 and infinity,
// +-5/8, +-3/2) and one half of the rows. A pass reads 9 weights of a channel, transforms the two columns and three
// rows, and multiplies with kTilesAtOnce tiles.
//
// Kept in registers: the sums of 6 points x kTilesAtOnce tiles, the transformed weights of one channel. In L1: a
// chunk's weights, which six passes read. Meanwhile the next chunk's are fetched into L2.
//
// Floor: 2*36*tiles*C*K/groups FLOPs at the FMA rate, a third more for transforming the weights of up to four tiles;
// the weights are read from memory once a tile block.
#include "conv2d_winograd_half.h"
#include "variant.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

// 1/N of each point.
constexpr double kInverse[kSide] = {1 / (kNear * kNear * kFar * kFar),
                                    1 / (2.0 * kNear * kNear * (kNear * kNear - kFar * kFar)),
                                    1 / (2.0 * kNear * kNear * (kNear * kNear - kFar * kFar)),
                                    1 / (2.0 * kFar * kFar * (kFar * kFar - kNear * kNear)),
                                    1 / (2.0 * kFar * kFar * (kFar * kFar - kNear * kNear)),
                                    1};

// ---- input ----------------------------------------------------------------------------------------------------------

template <typename T>
static void transform_tiles(const WinogradProblem& problem, const TileBlock& tiles, int64_t first, int64_t last,
                            float* to) {
  const int64_t point_stride = input_point_stride(problem);
  for (int64_t i = 0; i < tiles.count; ++i) {
    const TilePlace place = place_of(problem, tiles.first + i);
    for (int64_t v = first; v < last; ++v) {
      float* point = to + (v * tiles.count + i) * kVectorWidth;
      const auto put = [&](int row, int column, Vector value) __attribute__((always_inline)) {
        const float factor = static_cast<float>(kInverse[row] * kInverse[column]);
        store(point + (row * kSide + column) * point_stride, value * broadcast(factor));
      };
      transform_vector<T, kSide>(problem, place, v * kVectorWidth, put);
    }
  }
}

// ---- weights --------------------------------------------------------------------------------------------------------

// The pairs of columns.
enum Columns { kEnds, kNearPair, kFarPair };
constexpr int kFirstColumn[3] = {0, 1, 3}, kColumnStep[3] = {5, 1, 1};

template <int Pair>
static inline void transform_columns_of_row(const float* w, Vector& a, Vector& b) {
  const Vector w0 = load(w), w2 = load(w + 2 * kVectorWidth);
  if constexpr (Pair == kEnds) {
    a = w0, b = w2;
  } else if constexpr (Pair == kNearPair) {
    const Vector w1 = load(w + kVectorWidth), even = w0 + (kNear * kNear) * w2;
    a = even + w1, b = even - w1;
  } else {
    const Vector w1 = load(w + kVectorWidth), even = w0 + (kFar * kFar) * w2;
    a = even + (kFar / kNear) * w1, b = even - (kFar / kNear) * w1;
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

struct Pass {
  const float* panel;  // at the first point, chunk and tile
  int64_t panel_row, panel_column, vector_stride;
  const float* weight;
  int64_t vectors;  // of channels
  float* sums;
  int64_t sums_row, sums_column;
  bool add;  // to what earlier chunks left in `sums`
  Stream ahead;
};

template <int Pair, int Half, int Tiles>
static void run_pass(const Pass& pass) {
  Vector sum[2][3][Tiles];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 4
      for (int t = 0; t < Tiles; ++t) sum[j][i][t] = Vector{};
    }
  }
  const float* weight = pass.weight;
  const float* panel = pass.panel;
  Stream ahead = pass.ahead;
  for (int64_t v = 0; v < pass.vectors; ++v, panel += pass.vector_stride) {
    const float* x[2][3];
    for (int j = 0; j < 2; ++j) {
      for (int i = 0; i < 3; ++i) x[j][i] = panel + i * pass.panel_row + j * pass.panel_column;
    }
    for (int64_t lane = 0; lane < kVectorWidth; ++lane) {
      Vector w[2][3];
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) transform_columns_of_row<Pair>(weight + 3 * r * kVectorWidth, w[0][r], w[1][r]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        Vector u[3];
        transform_rows<Half>(w[j], u);
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 4
          for (int t = 0; t < Tiles; ++t) sum[j][i][t] += broadcast(x[j][i][t * kVectorWidth + lane]) * u[i];
        }
      }
      weight += kTaps * kVectorWidth;
      __builtin_prefetch(ahead.at, 0, 2);
      ahead.at += ahead.step;
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 4
      for (int t = 0; t < Tiles; ++t) {
        float* to = pass.sums + i * pass.sums_row + j * pass.sums_column + t * kVectorWidth;
        store(to, pass.add ? load(to) + sum[j][i][t] : sum[j][i][t]);
      }
    }
  }
}

using RunPass = void (*)(const Pass&);

struct Passes {
  RunPass by_tiles[3][2][kTilesAtOnce + 1] = {};  // [pair of columns][half of the rows][tiles]
  constexpr Passes() { fill<kTilesAtOnce>(); }
  template <int Tiles>
  constexpr void fill() {
    by_tiles[kEnds][0][Tiles] = run_pass<kEnds, 0, Tiles>;
    by_tiles[kEnds][1][Tiles] = run_pass<kEnds, 1, Tiles>;
    by_tiles[kNearPair][0][Tiles] = run_pass<kNearPair, 0, Tiles>;
    by_tiles[kNearPair][1][Tiles] = run_pass<kNearPair, 1, Tiles>;
    by_tiles[kFarPair][0][Tiles] = run_pass<kFarPair, 0, Tiles>;
    by_tiles[kFarPair][1][Tiles] = run_pass<kFarPair, 1, Tiles>;
    if constexpr (Tiles > 1) fill<Tiles - 1>();
  }
};
constexpr Passes kPasses;

// A chunk of channel vectors from `vector` of the panel on: all points, added to `products`.
static void multiply_chunk(const WinogradProblem& problem, int64_t tiles, const float* panel, int64_t vector,
                           int64_t count, const float* weight, bool add, float* products) {
  const int64_t panel_stride = input_point_stride(problem), product_stride = plain_product_stride(problem);
  const int64_t groups = (tiles + kTilesAtOnce - 1) / kTilesAtOnce;
  const int64_t values = count * kVectorWidth * kTaps * kVectorWidth;
  Pass pass;
  pass.panel_row = kSide * panel_stride;
  pass.vector_stride = tiles * kVectorWidth;
  pass.weight = weight;
  pass.vectors = count;
  pass.sums_row = kSide * product_stride;
  pass.add = add;
  pass.ahead = {reinterpret_cast<const char*>(weight + values), 0};
  pass.ahead.step = (values * 4 / (count * kVectorWidth) + 6 * groups - 1) / (6 * groups);
  for (int half = 0; half < 2; ++half) {
    for (int pair = 0; pair < 3; ++pair) {
      const int point = 3 * half * kSide + kFirstColumn[pair];
      pass.panel_column = kColumnStep[pair] * panel_stride;
      pass.sums_column = kColumnStep[pair] * product_stride;
      int64_t tile = 0;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t height = (tiles - tile + groups - group - 1) / (groups - group);
        pass.panel = panel + point * panel_stride + vector * pass.vector_stride + tile * kVectorWidth;
        pass.sums = products + point * product_stride + tile * kVectorWidth;
        kPasses.by_tiles[pair][half][height](pass);
        pass.ahead.at += pass.ahead.step * count * kVectorWidth;
        tile += height;
      }
    }
  }
}

}  // namespace

int64_t winograd_plain_scratch_bytes(const WinogradProblem& problem) {
  const int64_t vectors = problem.half_transformed ? kPair : 1;  // of products
  return kPointCount * (input_point_stride(problem) + vectors * plain_product_stride(problem)) * 4;
}

// Tasks: (part of the vectors of output channels, tile block), tile blocks fastest.
void winograd_plain_task(const WinogradProblem& problem, int64_t index, void* scratch) {
  const int64_t first = index / problem.blocks * problem.columns_per_task;
  const int64_t beyond = first + problem.columns_per_task;
  const int64_t last = beyond < problem.column_blocks ? beyond : problem.column_blocks;
  const TileBlock tiles = tile_block(problem, index % problem.blocks);
  float* panel = static_cast<float*>(scratch);
  float* products = panel + kPointCount * input_point_stride(problem);
  // Channel vectors of a group, and the group of a vector of output channels.
  const int64_t depth = problem.channel_vectors / problem.groups, width = problem.column_blocks / problem.groups;
  const int64_t first_vector = first / width * depth, last_vector = ((last - 1) / width + 1) * depth;
  if (problem.input.dtype == DType::f32) {
    transform_tiles<float>(problem, tiles, first_vector, last_vector, panel);
  } else {
    transform_tiles<uint16_t>(problem, tiles, first_vector, last_vector, panel);
  }
  const int64_t product_stride = plain_product_stride(problem);
  const auto finish_vector = [&](int64_t column, const float* from) {
    const int64_t channel = column * kVectorWidth, lanes = problem.out.c - channel;
    const Vector scale = load(problem.scale + channel), bias = load(problem.bias + channel);
    for (int64_t i = 0; i < tiles.count; ++i, from += kVectorWidth) {
      const TilePlace place = place_of(problem, tiles.first + i);
      if (problem.out.dtype == DType::f32) {
        transform_output<float, 4, kSide>(problem, place, channel, lanes, scale, bias, from, product_stride);
      } else {
        transform_output<uint16_t, 4, kSide>(problem, place, channel, lanes, scale, bias, from, product_stride);
      }
    }
  };
  if (problem.half_transformed) {
    constexpr int64_t kValues = kVectorWidth * kSide * 3 * kPair * kVectorWidth;  // of a vector of channels
    for (int64_t column = first; column < last; column += kPair) {
      const float* weight = problem.packed_weight + column / kPair * depth * kValues;
      for (int64_t v = 0; v < depth; v += kChunkVectors) {
        const int64_t count = depth - v < kChunkVectors ? depth - v : kChunkVectors;
        multiply_half_chunk(problem, tiles.count, panel, v, count, weight, v > 0, products);
        weight += count * kValues;
      }
      for (int k = 0; k < kPair; ++k) finish_vector(column + k, products + k * kPointCount * product_stride);
    }
    return;
  }
  for (int64_t column = first; column < last; ++column) {
    const float* weight = problem.packed_weight + column * depth * kVectorWidth * kTaps * kVectorWidth;
    for (int64_t v = 0; v < depth; v += kChunkVectors) {
      const int64_t count = depth - v < kChunkVectors ? depth - v : kChunkVectors;
      multiply_chunk(problem, tiles.count, panel, column / width * depth + v, count, weight, v > 0, products);
      weight += count * kVectorWidth * kTaps * kVectorWidth;
    }
    finish_vector(column, products);
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
