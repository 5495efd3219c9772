// The micro-kernel of direct convolution: up to kMicroRows output pixels x kColumnBlock output channels, all in
// registers, and the epilogue. micro_kernel serves 32 registers, four_step_micro_kernel AVX2's 16.
//
// Adjacent output pixels lie equally spaced in what the kernel reads. To keep their addresses to few registers, they
// are one of two pointers, half the rows apart, plus a small multiple of the spacing. A pixel's reduction values come
// in equally spaced runs, one after the other in the weights.
#pragma once

#include "table.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kHalfRows = kMicroRows / 2;

struct MicroSource {
  const float* first;        // of pixel 0
  int64_t stride;            // from one pixel to the next
  int64_t runs, run, pitch;  // runs of `run` values, `pitch` apart
  // What is needed later, fetched into L2 meanwhile: each step of the reduction touches one address.
  const char* ahead;
  int64_t ahead_step;
};

// Distance of row `at` of a half, as what an address can hold: 1, 2, 4 or 8 times a register.
static inline __attribute__((always_inline)) int64_t row_distance(int at, int64_t stride, int64_t stride3,
                                                                  int64_t stride5) {
  return at == 3 ? stride3 : at == 5 ? stride5 : at == 6 ? 2 * stride3 : at * stride;
}

// Where a micro-tile's sums come from and go to.
struct MicroTarget {
  float* partial;  // [row][partial_stride] sums of earlier chunks, or to be left for later ones
  int64_t partial_stride;
  bool load_partial, finish;
  const Conv2dProblem* problem;
  int64_t pixel;       // first output pixel
  int64_t channel;     // first output channel (over all groups)
  int64_t columns;     // valid output channels, <= kColumnBlock
  const float* scale;  // at this block
  const float* bias;
};

// Sums for bf16 memory: by way of fp32 memory, row by row.
template <int Rows, int Vectors>
static __attribute__((noinline)) void finish_bf16_rows(const MicroTarget& target, const float* sums) {
  const Conv2dProblem& problem = *target.problem;
  for (int i = 0; i < Rows; ++i, sums += Vectors * kVectorWidth) {
    const int64_t pixel = target.pixel + i;
    uint16_t* out = static_cast<uint16_t*>(problem.out.data) + pixel * problem.out.pixel_stride + target.channel;
    const uint16_t* residual = problem.residual ? static_cast<const uint16_t*>(problem.residual.data) +
                                                      pixel * problem.residual.pixel_stride + target.channel
                                                : nullptr;
    for (int64_t k = 0; k < target.columns; k += kVectorWidth) {
      const int64_t lanes = target.columns - k;
      Vector value = load(sums + k) * load(target.scale + k) + load(target.bias + k);
      if (residual != nullptr) value += lanes < kVectorWidth ? load_some(residual + k, lanes) : load(residual + k);
      if (problem.relu) value = relu(value);
      if (lanes < kVectorWidth) {
        store_some(out + k, value, lanes);
      } else {
        store(out + k, value);
      }
    }
  }
}

// fp32 sums, straight from the registers. Whole: every vector's channels are valid; else the last one's first few.
template <int Rows, int Vectors, bool Whole>
static inline __attribute__((always_inline)) void finish_in_registers(const MicroTarget& target,
                                                                      const Vector (&sum)[Rows][Vectors]) {
  const Conv2dProblem& problem = *target.problem;
  const int64_t lanes = target.columns - (Vectors - 1) * kVectorWidth;
  Vector scale[Vectors], bias[Vectors];
#pragma GCC unroll 2
  for (int j = 0; j < Vectors; ++j) {
    scale[j] = load(target.scale + j * kVectorWidth);
    bias[j] = load(target.bias + j * kVectorWidth);
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    const int64_t pixel = target.pixel + i;
    float* out = static_cast<float*>(problem.out.data) + pixel * problem.out.pixel_stride + target.channel;
    const float* residual = problem.residual ? static_cast<const float*>(problem.residual.data) +
                                                   pixel * problem.residual.pixel_stride + target.channel
                                             : nullptr;
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      const bool some = !Whole && j == Vectors - 1;
      Vector value = sum[i][j] * scale[j] + bias[j];
      if (residual != nullptr) {
        const float* from = residual + j * kVectorWidth;
        value += some ? load_some(from, lanes) : load(from);
      }
      if (problem.relu) value = relu(value);
      if (some) {
        store_some(out + j * kVectorWidth, value, lanes);
      } else {
        store(out + j * kVectorWidth, value);
      }
    }
  }
}

// The same where registers are few: all rows of one vector of channels after the other, so that only its scale and bias
// are in registers beside the sums, and without a branch for each row.
template <int Rows, int Vectors, bool Whole>
static inline __attribute__((always_inline)) void finish_by_vectors(const MicroTarget& target,
                                                                    Vector (&sum)[Rows][Vectors]) {
  const Conv2dProblem& problem = *target.problem;
  const int64_t lanes = target.columns - (Vectors - 1) * kVectorWidth;
#pragma GCC unroll 2
  for (int j = 0; j < Vectors; ++j) {
    const Vector scale = load(target.scale + j * kVectorWidth), bias = load(target.bias + j * kVectorWidth);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) sum[i][j] = sum[i][j] * scale + bias;
  }
  if (problem.residual) {
    const int64_t stride = problem.residual.pixel_stride;
    const float* from = static_cast<const float*>(problem.residual.data) + target.pixel * stride + target.channel;
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i, from += stride) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) {
        const float* at = from + j * kVectorWidth;
        sum[i][j] += !Whole && j == Vectors - 1 ? load_some(at, lanes) : load(at);
      }
    }
  }
  const Vector bound = broadcast(problem.relu ? 0.0f : -__builtin_inff());
  const int64_t stride = problem.out.pixel_stride;
  float* out = static_cast<float*>(problem.out.data) + target.pixel * stride + target.channel;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i, out += stride) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      const Vector value = at_least(sum[i][j], bound);
      if (!Whole && j == Vectors - 1) {
        store_some(out + j * kVectorWidth, value, lanes);
      } else {
        store(out + j * kVectorWidth, value);
      }
    }
  }
}

// What the epilogue reads and writes, asked for while the first sums are formed: a row with each step, because a burst
// of requests holds up the weights behind it.
struct EpilogueAhead {
  const char *to, *from;  // output, residual; without one, the output again
  int64_t to_step, from_step, last;
  int64_t rows;  // still to be asked for

  EpilogueAhead(const MicroTarget& target, int64_t count) : rows(target.finish ? count : 0) {
    const TensorView& out = target.problem->out;
    const TensorView& source = target.problem->residual ? target.problem->residual : out;
    const int64_t item = size_in_bytes(out.dtype);
    to = static_cast<const char*>(out.data) + (target.pixel * out.pixel_stride + target.channel) * item;
    from = static_cast<const char*>(source.data) + (target.pixel * source.pixel_stride + target.channel) * item;
    to_step = out.pixel_stride * item;
    from_step = source.pixel_stride * item;
    last = (target.columns - 1) * item;
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

// What follows a micro-tile's sums: they are added to earlier ones, kept, or finished.
template <int Rows, int Vectors>
static inline __attribute__((always_inline)) void complete(const MicroTarget& target, Vector (&sum)[Rows][Vectors]) {
  // A chunk is summed by itself and then added to the earlier ones: rounding grows with a chunk's length, not the
  // filter's.
  if (target.load_partial) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) {
        sum[i][j] += load(target.partial + i * target.partial_stride + j * kVectorWidth);
      }
    }
  }
  if (!target.finish) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) store(target.partial + i * target.partial_stride + j * kVectorWidth, sum[i][j]);
    }
    return;
  }
  const Conv2dProblem& problem = *target.problem;
  if (problem.out.dtype != DType::f32) {
    alignas(64) float sums[Rows * Vectors * kVectorWidth];
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) store(sums + (i * Vectors + j) * kVectorWidth, sum[i][j]);
    }
    finish_bf16_rows<Rows, Vectors>(target, sums);
  } else if constexpr (kStepsInFours) {
    if (target.columns == Vectors * kVectorWidth) {
      finish_by_vectors<Rows, Vectors, true>(target, sum);
    } else {
      finish_by_vectors<Rows, Vectors, false>(target, sum);
    }
  } else if (target.columns == Vectors * kVectorWidth) {
    finish_in_registers<Rows, Vectors, true>(target, sum);
  } else {
    finish_in_registers<Rows, Vectors, false>(target, sum);
  }
}

// As EpilogueAhead, where a row's output is one cache line, and so is its residual.
struct EpilogueLines {
  const char *to, *from;
  int64_t to_step, from_step;
  int64_t rows;  // still to be asked for
  bool both;     // whether `from` is not what `to` is

  EpilogueLines(const MicroTarget& target, int64_t count) : rows(target.finish ? count : 0) {
    const TensorView &out = target.problem->out, &residual = target.problem->residual;
    const int64_t item = size_in_bytes(out.dtype);
    to_step = out.pixel_stride * item;
    from_step = residual.pixel_stride * item;
    to = static_cast<const char*>(out.data) + target.pixel * to_step + target.channel * item;
    both = residual && residual.data != out.data;
    from = both ? static_cast<const char*>(residual.data) + target.pixel * from_step + target.channel * item : to;
  }

  void skip(int64_t count) {
    to += count * to_step;
    from += count * from_step;
  }

  void ask() {
    __builtin_prefetch(to, 1, 3);
    if (both) __builtin_prefetch(from, 0, 3);
    skip(1);
  }
};

// One step of the reduction, `at` steps behind what the pointers say. Distances are in bytes.
template <int Rows, int Vectors>
static inline __attribute__((always_inline)) void add_products(const char* const (&x)[2], int64_t stride,
                                                               const float* weight, int at,
                                                               Vector (&sum)[Rows][Vectors]) {
  Vector w[Vectors];
#pragma GCC unroll 2
  for (int j = 0; j < Vectors; ++j) w[j] = load(weight + at * kColumnBlock + j * kVectorWidth);
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    const char* from = x[i / kHalfRows] + i % kHalfRows * stride + at * 4;
    const Vector value = broadcast(*reinterpret_cast<const float*>(from));
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) add_product(sum[i][j], value, w[j]);
  }
}

// The same for AVX2. An FMA there is half as wide and a step has 12 of them, not 28: what stands around them counts,
// most of all while another thread runs on the same core and takes its share of the instructions. So four steps are
// taken at a time, whose addresses differ by constants: 92 instructions, where micro_kernel has 116.
template <int Rows, int Vectors>
static void four_step_micro_kernel(const MicroSource& source, const float* weight, const MicroTarget& target) {
  constexpr int kSteps = 4, kRowsAsked = 2;
  Vector sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sum[i][j] = Vector{};
  }
  EpilogueLines epilogue(target, Rows);
  // So few steps are done before what they ask for is there: they ask for the next micro-tile's.
  if (source.runs * source.run <= 48) epilogue.skip(Rows);
  const char* ahead = source.ahead;
  const int64_t ahead_step = source.ahead_step, run_length = source.run;
  int64_t stride = source.stride * 4;
  const char* from = reinterpret_cast<const char*>(source.first);
  for (int64_t run = 0; run < source.runs; ++run, from += source.pitch * 4) {
    const char* x[2] = {from, from + kHalfRows * stride};
    int64_t k = run_length;
    for (; k >= kSteps; k -= kSteps) {
      if (epilogue.rows > 0) {
        epilogue.ask();
        epilogue.ask();
        epilogue.rows -= kRowsAsked;
      }
      __builtin_prefetch(ahead, 0, 2);
      if (ahead_step > 64 / kSteps) {  // not one line for all
        __builtin_prefetch(ahead + ahead_step, 0, 2);
        __builtin_prefetch(ahead + 2 * ahead_step, 0, 2);
        __builtin_prefetch(ahead + 3 * ahead_step, 0, 2);
      }
      ahead += kSteps * ahead_step;
      // Keeps the compiler from making a pointer for every row.
      __asm__("" : "+r"(x[0]), "+r"(x[1]), "+r"(stride));
      add_products(x, stride, weight, 0, sum);
      add_products(x, stride, weight, 1, sum);
      add_products(x, stride, weight, 2, sum);
      add_products(x, stride, weight, 3, sum);
      weight += kSteps * kColumnBlock;
      x[0] += kSteps * 4, x[1] += kSteps * 4;
    }
    for (; k > 0; --k) {
      __asm__("" : "+r"(x[0]), "+r"(x[1]), "+r"(stride));
      add_products(x, stride, weight, 0, sum);
      ahead += ahead_step;
      weight += kColumnBlock;
      x[0] += 4, x[1] += 4;
    }
  }
  complete(target, sum);
}

template <int Rows, int Vectors>
static void micro_kernel(const MicroSource& source, const float* weight, const MicroTarget& target) {
  Vector sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sum[i][j] = Vector{};
  }
  EpilogueAhead epilogue(target, Rows);
  const char* ahead = source.ahead;
  int64_t stride = source.stride, stride3 = 3 * stride, stride5 = 5 * stride;
  for (int64_t run = 0; run < source.runs; ++run) {
    const float* from = source.first + run * source.pitch;
    const float* x[2] = {from, from + kHalfRows * stride};
    const auto step = [&]() __attribute__((always_inline)) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += source.ahead_step;
      Vector w[Vectors];
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) w[j] = load(weight + j * kVectorWidth);
      weight += kColumnBlock;
      // Keeps the compiler from making a pointer for every row.
      __asm__("" : "+r"(x[0]), "+r"(x[1]), "+r"(stride), "+r"(stride3), "+r"(stride5));
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const int64_t at = row_distance(i % kHalfRows, stride, stride3, stride5);
        const Vector value = broadcast(x[i / kHalfRows][at]);
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) sum[i][j] += value * w[j];
      }
      ++x[0], ++x[1];
    };
    const int64_t asked = source.run < epilogue.rows ? source.run : epilogue.rows;
    epilogue.rows -= asked;
    for (int64_t k = 0; k < asked; ++k) {
      epilogue.ask();
      step();
    }
    for (int64_t k = asked; k < source.run; ++k) step();
  }
  complete(target, sum);
}

// The same for few rows and kWideBlocks column blocks at once: the sums of one or two rows are so few that each would
// wait for its own last product. `weight` is the first block's, the next ones' lie `block_stride` further on.
constexpr int kWideBlocks = 4, kWideRows = 2;

template <int Rows>
static void wide_micro_kernel(const MicroSource& source, const float* weight, int64_t block_stride,
                              const MicroTarget* targets) {
  Vector sum[kWideBlocks][Rows][kMicroVectors];
#pragma GCC unroll 4
  for (int b = 0; b < kWideBlocks; ++b) {
#pragma GCC unroll 2
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kMicroVectors; ++j) sum[b][i][j] = Vector{};
    }
  }
  for (int64_t run = 0; run < source.runs; ++run) {
    const float* x = source.first + run * source.pitch;
    for (int64_t k = 0; k < source.run; ++k, ++x, weight += kColumnBlock) {
#pragma GCC unroll 4
      for (int b = 0; b < kWideBlocks; ++b) {
#pragma GCC unroll 2
        for (int i = 0; i < Rows; ++i) {
          const Vector value = broadcast(x[i * source.stride]);
#pragma GCC unroll 2
          for (int j = 0; j < kMicroVectors; ++j) {
            sum[b][i][j] += value * load(weight + b * block_stride + j * kVectorWidth);
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < kWideBlocks; ++b) complete(targets[b], sum[b]);
}

using MicroKernel = void (*)(const MicroSource&, const float*, const MicroTarget&);

template <int Vectors>
struct MicroKernels {
  MicroKernel by_rows[kMicroRows + 1] = {};
  constexpr MicroKernels() { fill<kMicroRows>(); }
  template <int Rows>
  constexpr void fill() {
    if constexpr (kStepsInFours) {
      by_rows[Rows] = four_step_micro_kernel<Rows, Vectors>;
    } else {
      by_rows[Rows] = micro_kernel<Rows, Vectors>;
    }
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
};

constexpr MicroKernels<1> kOneVector;
constexpr MicroKernels<2> kTwoVectors;

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
