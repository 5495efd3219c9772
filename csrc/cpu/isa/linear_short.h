// A fully connected layer with few input rows whose weights are stored short: without loss, 28 bits for an fp32 value
// and 12 for a bf16 one. Such a layer waits for its weights, so fewer bytes are less time.
//
//   y[m, k] = act(sum_c x[m, c] * w[k, c] + bias[k])
//
// Shapes: x (M, C), y (M, K), rows at any stride, M at most kLinearFewRows; w (K, C), packed by linear_short.cpp.
// For AVX-512; AVX2 has another layout of the same bits: linear_short_words.cpp.
//
// A value is its sign and fraction as they are, and four bits for its exponent: 0 is the exponent 0, n from 1 to 15 is
// `first_exponent + n - 1`. Trained and random weights alike have nearly all exponents within a window of 15; a value
// outside is an exception, stored beside. 4 weight rows make a group, a vector's lanes of consecutive c of each a
// block:
//
//   fp32, 16 lanes: [row 0..3][lane] 3 bytes, sign above the fraction; [row pair][lane] 1 byte of two exponents: 224
//   bf16, 32 lanes: [row 0..3][lane] 1 byte, sign above the fraction; [row pair][lane] 1 byte of two exponents: 192
//
// the lower four bits for the pair's first row. Rows and lanes beyond K and C are zeros.
//
// Work: a task owns all M input rows x some groups, and passes through its groups once for every 4 input rows, the
// later times in L2. The order of additions is that of isa/linear.cpp (linear_bf16.cpp), so the bits are too. What is
// read kAhead bytes later is fetched meanwhile: the processor's own prefetching stops at the end of a page.
//
// Registers: 4 x 4 accumulators, 4 weights, one input; the tables of decoding. Floor: 3.5 bytes (1.5) a weight.
#pragma once

#include <immintrin.h>

#include "linear_lanes.h"
#include "table.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kShortTileRows = 4;
constexpr int64_t kAhead = 8192;

// `Value` says how a block is decoded and multiplied:
//   kLanes, kBlockBytes, Item, Weights   of a block; the type of x and y; a decoded vector
//   decode(block, w)                     the 4 rows' weights
//   put(w, lane, bits)                   one of them
//   load(x, count), add(sum, x, w)       `count` lanes of x, the others zero; sum + x * w
template <typename Value, int Rows>
static void short_products(const LinearShortProblem& problem, const Value& value, const typename Value::Item* x,
                           const uint8_t* block, const LinearException* exception, const LinearException* last,
                           float (*sums)[kLinearShortRows]) {
  __m512 sum[Rows][kLinearShortRows];
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kLinearShortRows; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  const int64_t whole = problem.depth / Value::kLanes, blocks = (problem.depth + Value::kLanes - 1) / Value::kLanes;
  const auto add = [&](int64_t at, int64_t count,
                       const typename Value::Weights(&w)[kLinearShortRows]) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const typename Value::Weights input = Value::load(x + i * problem.input_stride + at * Value::kLanes, count);
#pragma GCC unroll 4
      for (int j = 0; j < kLinearShortRows; ++j) sum[i][j] = Value::add(sum[i][j], input, w[j]);
    }
  };
  for (int64_t at = 0; at < blocks;) {
    const int64_t stop = exception < last && exception->block < whole ? exception->block : whole;
    for (; at < stop; ++at, block += Value::kBlockBytes) {
      typename Value::Weights w[kLinearShortRows];
#pragma GCC unroll 4
      for (int line = 0; line < Value::kBlockBytes; line += 64) __builtin_prefetch(block + kAhead + line);
      value.decode(block, w);
      add(at, Value::kLanes, w);
    }
    if (at == blocks) break;
    // A block with exceptions, or the last one, which has fewer lanes.
    typename Value::Weights w[kLinearShortRows];
    value.decode(block, w);
    for (; exception < last && exception->block == at; ++exception) {
      Value::put(w[exception->row], exception->lane, exception->bits);
    }
    const int64_t left = problem.depth - at * Value::kLanes;
    add(at, left < Value::kLanes ? left : Value::kLanes, w);
    ++at, block += Value::kBlockBytes;
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kLinearShortRows; ++j) sums[i][j] = add_lanes((Vector)sum[i][j]);
  }
}

template <typename Value>
static void run_short(const LinearShortProblem& problem, int64_t index) {
  using Item = typename Value::Item;
  const Value value(problem.first_exponent);
  const int64_t first = index * problem.groups_per_task;
  const int64_t groups = (problem.columns + kLinearShortRows - 1) / kLinearShortRows;
  const int64_t end = first + problem.groups_per_task < groups ? first + problem.groups_per_task : groups;
  const int64_t group_bytes = (problem.depth + Value::kLanes - 1) / Value::kLanes * Value::kBlockBytes;
  const int64_t tiles = (problem.rows + kShortTileRows - 1) / kShortTileRows;
  float sums[kShortTileRows][kLinearShortRows];
  for (int64_t group = first; group < end; ++group) {
    const int64_t k = group * kLinearShortRows;
    const int64_t width = problem.columns - k < kLinearShortRows ? problem.columns - k : kLinearShortRows;
    const uint8_t* blocks = problem.blocks + group * group_bytes;
    const LinearException* exception = problem.exceptions + problem.first_exception[group];
    const LinearException* last = problem.exceptions + problem.first_exception[group + 1];
    int64_t m = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t height = (problem.rows - m + tiles - tile - 1) / (tiles - tile);  // nearly equal tiles
      const Item* x = static_cast<const Item*>(problem.input) + m * problem.input_stride;
      switch (height) {
        case 1:
          short_products<Value, 1>(problem, value, x, blocks, exception, last, sums);
          break;
        case 2:
          short_products<Value, 2>(problem, value, x, blocks, exception, last, sums);
          break;
        case 3:
          short_products<Value, 3>(problem, value, x, blocks, exception, last, sums);
          break;
        default:
          short_products<Value, 4>(problem, value, x, blocks, exception, last, sums);
      }
      for (int64_t i = 0; i < height; ++i) {
        Item* out = static_cast<Item*>(problem.out) + (m + i) * problem.out_stride + k;
        for (int64_t j = 0; j < width; ++j) {
          const float y = sums[i][j] + (problem.bias != nullptr ? problem.bias[k + j] : 0.0f);
          store_one(out + j, problem.relu ? relu(y) : y);
        }
      }
      m += height;
    }
  }
}

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
