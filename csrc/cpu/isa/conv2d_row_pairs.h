// Direct convolution into at most one vector of output channels: two output rows at a time.
//
// Where a micro-tile of conv2d_micro.h has one vector of channels, each product loads its own input value, and loading
// is what it waits for. Two output rows share most of their input rows: here a value that was loaded is multiplied by
// the weights of two filter rows, one for each output row,
//
//   sum[0][i] += x[h][i + s] * w[h][s],   sum[1][i] += x[h][i + s] * w[h - stride][s]
//
// for input rows h from the upper row's first one to the lower row's last. Each sum is formed in the order of
// conv2d_micro.h, so results have the same bits.
//
// Max pooling of 2x2 windows with stride 2 (problem.max_pool, asked for by a frozen model) is taken from the registers.
//
// Kept in registers: 14 x 2 accumulators, two weight vectors, one broadcast. Floor: as conv2d.cpp, by full vectors.
#pragma once

#include "conv2d_micro.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

// The maximum of each 2x2 window of two finished rows; target.pixel is the first one's, after pooling.
template <int Rows>
static inline __attribute__((always_inline)) void finish_pooled(const MicroTarget& target,
                                                                const Vector (&sum)[2][Rows][1]) {
  const Conv2dProblem& problem = *target.problem;
  const Vector scale = load(target.scale), bias = load(target.bias);
  float* out = static_cast<float*>(problem.out.data) + target.pixel * problem.out.pixel_stride + target.channel;
#pragma GCC unroll 8
  for (int i = 0; i + 1 < Rows; i += 2, out += problem.out.pixel_stride) {
    const Vector upper = larger(sum[0][i][0] * scale + bias, sum[0][i + 1][0] * scale + bias);
    const Vector lower = larger(sum[1][i][0] * scale + bias, sum[1][i + 1][0] * scale + bias);
    Vector value = larger(upper, lower);
    if (problem.relu) value = relu(value);
    if (target.columns < kVectorWidth) {
      store_some(out, value, target.columns);
    } else {
      store(out, value);
    }
  }
}

// `Rows` pixels of two output rows. source.runs: filter rows; `weight`: of the first one; shift: input rows from one
// output row to the next.
template <int Rows>
static void row_pair_kernel(const MicroSource& source, int64_t shift, const float* weight, const MicroTarget& upper,
                            const MicroTarget& lower) {
  Vector sum[2][Rows][1];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) sum[0][i][0] = sum[1][i][0] = Vector{};
  const char* ahead = source.ahead;
  int64_t stride = source.stride, stride3 = 3 * stride, stride5 = 5 * stride;
  const float* from = source.first;
  const float* weights[2] = {weight, weight};  // of each output row
  // Some input rows, which both output rows read, or one.
  const auto input_rows = [&](int64_t count, bool for_upper, bool for_lower) __attribute__((always_inline)) {
    for (int64_t run = 0; run < count; ++run, from += source.pitch) {
      const float* x[2] = {from, from + kHalfRows * stride};
      for (int64_t k = 0; k < source.run; ++k) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += source.ahead_step;
        Vector w[2];
        if (for_upper) w[0] = load(weights[0]), weights[0] += kColumnBlock;
        if (for_lower) w[1] = load(weights[1]), weights[1] += kColumnBlock;
        // Keeps the compiler from making a pointer for every row.
        __asm__("" : "+r"(x[0]), "+r"(x[1]), "+r"(stride), "+r"(stride3), "+r"(stride5));
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
          const Vector value = broadcast(x[i / kHalfRows][row_distance(i % kHalfRows, stride, stride3, stride5)]);
          if (for_upper) sum[0][i][0] += value * w[0];
          if (for_lower) sum[1][i][0] += value * w[1];
        }
        ++x[0], ++x[1];
      }
    }
  };
  input_rows(shift, true, false);
  input_rows(source.runs - shift, true, true);
  input_rows(shift, false, true);
  if (upper.problem->max_pool) {
    finish_pooled(upper, sum);
    return;
  }
  complete(upper, sum[0]);
  complete(lower, sum[1]);
}

using RowPairKernel = void (*)(const MicroSource&, int64_t, const float*, const MicroTarget&, const MicroTarget&);

struct RowPairKernels {
  RowPairKernel by_rows[kMicroRows + 1] = {};
  constexpr RowPairKernels() { fill<kMicroRows>(); }
  template <int Rows>
  constexpr void fill() {
    by_rows[Rows] = row_pair_kernel<Rows>;
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
};

constexpr RowPairKernels kRowPairs;

// Convolved rows, and columns, of an output pixel.
static int64_t pixel_unit(const Conv2dProblem& problem) {
  return problem.convolved(1);
}

// How many of `rows` output rows of a task are in pairs.
static int64_t paired_rows(const Conv2dProblem& problem, int64_t rows) {
  return problem.max_pool ? rows : rows / 2 * 2;
}

// Micro-tiles across a row: whole output pixels.
static int64_t row_pair_parts(const Conv2dProblem& problem) {
  const int64_t most = kMicroRows / pixel_unit(problem);
  return (problem.out.w + most - 1) / most;
}

// Steps of the reduction that `rows` output rows take.
static int64_t row_pair_steps(const Conv2dProblem& problem, int64_t rows) {
  const Conv2dGeometry& g = problem.geometry;
  return problem.convolved(rows) / 2 * row_pair_parts(problem) * (g.filter_h + g.stride_h) * g.filter_w *
         problem.group_in;
}

// Output rows [p0, p0 + rows) of image n, all of them in pairs. `source` says what is fetched ahead.
static void run_row_pairs(const Conv2dProblem& problem, int64_t n, int64_t p0, int64_t rows, const StripRows& strip,
                          const float* weight, MicroSource source, const MicroTarget& target) {
  const Conv2dGeometry& g = problem.geometry;
  const int64_t unit = pixel_unit(problem), parts = row_pair_parts(problem);
  const int64_t step = g.stride_w * problem.group_in, width = problem.out.w;
  source.stride = step;
  source.runs = g.filter_h;
  source.run = g.filter_w * problem.group_in;
  source.pitch = strip.pitch;
  MicroTarget upper = target;
  upper.load_partial = false;
  upper.finish = true;
  MicroTarget lower = upper;
  for (int64_t row = 0; row < unit * rows; row += 2) {
    upper.pixel = (n * problem.out.h + p0 + row / unit) * width;
    lower.pixel = upper.pixel + width;
    const float* from = strip.first + row * g.stride_h * strip.pitch;
    int64_t q = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t count = (width - q + parts - part - 1) / (parts - part);
      source.first = from + unit * q * step;
      kRowPairs.by_rows[unit * count](source, g.stride_h, weight, upper, lower);
      source.ahead += (g.filter_h + g.stride_h) * source.run * source.ahead_step;
      q += count;
      upper.pixel += count;
      lower.pixel += count;
    }
  }
}

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
