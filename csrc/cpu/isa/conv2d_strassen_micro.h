// The micro-kernel of Strassen's algorithm: the products of one micro-tile, one after the other, with their sums in
// registers from one product to the next.
//
// A micro-tile is up to 2*kMicroRows pixels x 2*kColumnBlock columns x one chunk of the reduction, cut in halves each
// way: quadrants. Of two blocks' product
//
//   C11 C12     A11 A12     B11 B12            A: pixels x channels, B: channels x columns
//   C21 C22  =  A21 A22  x  B21 B22
//
// Winograd's form of the algorithm takes 7 products of quadrants instead of 8. In the order in which they are formed:
//
//   kept  = P5 = (A21 + A22)             (B12 - B11)              = S1 T1
//   held  = P1 = A11 B11
//   C11   = P1 + A12 B21
//   held  = U2 = P1 + (S1 - A11)         (B22 - T1)               = P1 + S2 T2
//   spare = U3 = U2 + (A11 - A21)        (B22 - B12)              = U2 + S3 T3
//   C22   = U3 + P5
//   C21   = U3 + A22                     (B21 - T2)               = U3 + A22 T4
//   C12   = U2 + P5 + (A12 - S2) B22                              = U2 + P5 + S4 B22
//
// Products that follow each other in a quadrant never leave the registers; `held`, `kept` and `spare` lie in L1. The
// first micro-tile of a task to use a pair of column blocks forms the T on the way, in the shadow of its products, and
// leaves them for the others: weights stay as the plain sum packs them.
#pragma once

#include <utility>

#include "table.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kStrassenProducts = 7;
constexpr int64_t kQuadrantFloats = kMicroRows * kColumnBlock;

// What the sums are when a product begins: zeros, what the product before it left, or from memory.
enum class Begin : uint8_t { zero, go_on, held, spare, held_and_kept };
// What becomes of them at its end; finish_kept: they are left in `spare`, and with `kept` added finish their quadrant.
enum class End : uint8_t { go_on, hold, keep, finish, finish_kept };

struct StrassenStep {
  const float* x;  // of row 0
  int64_t stride;  // from one row to the next
  const float* weight;
  const float* minus;  // subtracted from `weight`, and the difference left in `sum`; null: no sum is formed
  float* sum;
  Begin begin;
  End end;
  int quadrant;  // that is finished
  int ask;       // quadrant whose memory is asked for meanwhile, or -1
};

struct Quadrant {
  int64_t rows;  // valid pixels: of the lower quadrants maybe one less than of the upper ones
  int64_t pixel, channel, columns;
  const float* scale;
  const float* bias;
  float* partial;  // [row][kColumnBlock] sums of earlier chunks, or to be left for later ones
};

struct StrassenTile {
  const StrassenProblem* problem;
  const StrassenStep* steps;
  int count;
  int64_t reduction;
  const Quadrant* quadrants;
  bool load_partial, finish;
  // What is needed later, fetched into L2 meanwhile: of each step the first address.
  const char* ahead[kStrassenProducts];
  int64_t ahead_step;
  alignas(64) float held[kQuadrantFloats], kept[kQuadrantFloats], spare[kQuadrantFloats], whole[kQuadrantFloats];
};

static float* out_of(const StrassenProblem& problem, const Quadrant& quadrant) {
  return static_cast<float*>(problem.out.data) + quadrant.pixel * problem.out.pixel_stride + quadrant.channel;
}

// Null where there is none.
static const float* residual_of(const StrassenProblem& problem, const Quadrant& quadrant) {
  const TensorView& residual = problem.residual;
  if (!residual) return nullptr;
  return static_cast<const float*>(residual.data) + quadrant.pixel * residual.pixel_stride + quadrant.channel;
}

// The epilogue of column blocks that are not whole, by way of memory: sums are [row][kColumnBlock].
static __attribute__((noinline)) void finish_some(const StrassenProblem& problem, const Quadrant& quadrant,
                                                  const float* sums) {
  float* out = out_of(problem, quadrant);
  const float* residual = residual_of(problem, quadrant);
  for (int64_t i = 0; i < quadrant.rows; ++i, sums += kColumnBlock, out += problem.out.pixel_stride) {
    for (int64_t k = 0; k < quadrant.columns; k += kVectorWidth) {
      const int64_t lanes = quadrant.columns - k;
      Vector value = load(sums + k) * load(quadrant.scale + k) + load(quadrant.bias + k);
      if (residual != nullptr) value += lanes < kVectorWidth ? load_some(residual + k, lanes) : load(residual + k);
      if (problem.relu) value = relu(value);
      if (lanes < kVectorWidth) {
        store_some(out + k, value, lanes);
      } else {
        store(out + k, value);
      }
    }
    if (residual != nullptr) residual += problem.residual.pixel_stride;
  }
}

// What a quadrant's end reads and writes, asked for a row at a time while products are formed.
struct QuadrantAhead {
  const char *to, *from;  // the output or partial sums; the residual, else the same again
  int64_t to_step = kColumnBlock * 4, from_step = kColumnBlock * 4, last = (kColumnBlock - 1) * 4;

  QuadrantAhead(const StrassenTile& tile, const Quadrant& quadrant) {
    to = from = reinterpret_cast<const char*>(quadrant.partial);
    if (!tile.finish) return;
    const StrassenProblem& problem = *tile.problem;
    to = from = reinterpret_cast<const char*>(out_of(problem, quadrant));
    to_step = from_step = problem.out.pixel_stride * 4;
    last = (quadrant.columns - 1) * 4;
    if (!problem.residual) return;
    from = reinterpret_cast<const char*>(residual_of(problem, quadrant));
    from_step = problem.residual.pixel_stride * 4;
  }

  void ask() {
    __builtin_prefetch(to, 1, 3);
    __builtin_prefetch(to + last, 1, 3);
    __builtin_prefetch(from, 0, 3);
    __builtin_prefetch(from + last, 0, 3);
    to += to_step;
    from += from_step;
  }
};

// f(row, vector) for every accumulator, unrolled whatever the compiler thinks of it: one loop that is not keeps all of
// them in memory.
template <typename F, int... At>
static inline __attribute__((always_inline)) void each(std::integer_sequence<int, At...>, F f) {
  (f(At / kMicroVectors, At % kMicroVectors), ...);
}

template <int Rows>
static void strassen_micro_tile(StrassenTile& tile) {
  constexpr int kHalf = kMicroRows / 2;  // pixels that one pointer reaches, as in conv2d_micro.h
  constexpr std::make_integer_sequence<int, Rows * kMicroVectors> all;
  const StrassenProblem& problem = *tile.problem;
  Vector sum[Rows][kMicroVectors] = {};
  const auto at = [](int i, int j) { return i * kColumnBlock + j * kVectorWidth; };
  for (int s = 0; s < tile.count; ++s) {
    const StrassenStep& step = tile.steps[s];
    if (step.begin == Begin::zero) {
      each(all, [&](int i, int j) __attribute__((always_inline)) { sum[i][j] = Vector{}; });
    } else if (step.begin != Begin::go_on) {
      const float* from = step.begin == Begin::spare ? tile.spare : tile.held;
      each(all, [&](int i, int j) __attribute__((always_inline)) { sum[i][j] = load(from + at(i, j)); });
      if (step.begin == Begin::held_and_kept) {
        each(all, [&](int i, int j) __attribute__((always_inline)) { sum[i][j] += load(tile.kept + at(i, j)); });
      }
    }

    int64_t stride = step.stride, stride3 = 3 * stride, stride5 = 5 * stride;
    const float* x[2] = {step.x, step.x + kHalf * stride};
    const float* weight = step.weight;
    const char* ahead = tile.ahead[s];
    const auto multiply = [&](const Vector(&w)[kMicroVectors]) __attribute__((always_inline)) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += tile.ahead_step;
      // Keeps the compiler from making a pointer for every row.
      __asm__("" : "+r"(x[0]), "+r"(x[1]), "+r"(stride), "+r"(stride3), "+r"(stride5));
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const int r = i % kHalf;
        const Vector value = broadcast(x[i / kHalf][r == 3   ? stride3
                                                    : r == 5 ? stride5
                                                    : r == 6 ? 2 * stride3
                                                             : r * stride]);
#pragma GCC unroll 2
        for (int j = 0; j < kMicroVectors; ++j) sum[i][j] += value * w[j];
      }
      ++x[0], ++x[1];
    };
    static_assert(kMicroVectors == 2, "weights are loaded two vectors at a time");
    if (step.minus != nullptr) {
      const float* minus = step.minus;
      float* to = step.sum;
      for (int64_t k = 0; k < tile.reduction; ++k) {
        const Vector w[2] = {load(weight) - load(minus), load(weight + kVectorWidth) - load(minus + kVectorWidth)};
        store(to, w[0]);
        store(to + kVectorWidth, w[1]);
        weight += kColumnBlock, minus += kColumnBlock, to += kColumnBlock;
        multiply(w);
      }
    } else {
      int64_t asked = 0;
      if (step.ask >= 0) {
        QuadrantAhead ends(tile, tile.quadrants[step.ask]);
        const int64_t rows = tile.quadrants[step.ask].rows;
        for (; asked < rows && asked < tile.reduction; ++asked, weight += kColumnBlock) {
          ends.ask();
          multiply({load(weight), load(weight + kVectorWidth)});
        }
      }
      for (int64_t k = asked; k < tile.reduction; ++k, weight += kColumnBlock) {
        multiply({load(weight), load(weight + kVectorWidth)});
      }
    }

    if (step.end == End::go_on) continue;
    if (step.end != End::finish) {
      float* to = step.end == End::hold ? tile.held : step.end == End::keep ? tile.kept : tile.spare;
      each(all, [&](int i, int j) __attribute__((always_inline)) { store(to + at(i, j), sum[i][j]); });
      if (step.end != End::finish_kept) continue;
      each(all, [&](int i, int j) __attribute__((always_inline)) { sum[i][j] += load(tile.kept + at(i, j)); });
    }
    const Quadrant& quadrant = tile.quadrants[step.quadrant];
    // A chunk is summed by itself and then added to the earlier ones, as in conv2d_micro.h.
    if (tile.load_partial) {
      const float* from = quadrant.partial;
      each(all, [&](int i, int j) __attribute__((always_inline)) { sum[i][j] += load(from + at(i, j)); });
    }
    if (!tile.finish || quadrant.columns < kColumnBlock) {
      float* to = tile.finish ? tile.whole : quadrant.partial;
      each(all, [&](int i, int j) __attribute__((always_inline)) { store(to + at(i, j), sum[i][j]); });
      if (tile.finish) finish_some(problem, quadrant, to);
      continue;
    }
    // All reads before the first write: rows a multiple of 4 KiB apart look alike to the processor, and a read waits
    // for a write that might be to its address.
    each(all, [&](int i, int j) __attribute__((always_inline)) {
      sum[i][j] = sum[i][j] * load(quadrant.scale + j * kVectorWidth) + load(quadrant.bias + j * kVectorWidth);
    });
    if (const float* from = residual_of(problem, quadrant)) {
      const int64_t pitch = problem.residual.pixel_stride;
      each(all, [&](int i, int j) __attribute__((always_inline)) {
        if (i < Rows - 1 || i < quadrant.rows) sum[i][j] += load(from + i * pitch + j * kVectorWidth);
      });
    }
    if (problem.relu) each(all, [&](int i, int j) __attribute__((always_inline)) { sum[i][j] = relu(sum[i][j]); });
    float* out = out_of(problem, quadrant);
    const int64_t pitch = problem.out.pixel_stride;
    each(all, [&](int i, int j) __attribute__((always_inline)) {
      if (i < Rows - 1 || i < quadrant.rows) store(out + i * pitch + j * kVectorWidth, sum[i][j]);
    });
  }
}

struct StrassenMicroTiles {
  void (*by_rows[kMicroRows + 1])(StrassenTile&) = {};
  constexpr StrassenMicroTiles() { fill<kMicroRows>(); }
  template <int Rows>
  constexpr void fill() {
    by_rows[Rows] = strassen_micro_tile<Rows>;
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
};

constexpr StrassenMicroTiles kStrassenMicroTiles;

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
