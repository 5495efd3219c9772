// Element-wise arithmetic with a value per channel: batch norm, and the residual addition.
//
//   y[p, c] = act((x[p, c] - centre[c]) * scale[c] + shift[c] + residual[p, c])
//
// Batch norm in training takes the batch's mean off first: x * scale + (beta - mean * scale) would be the difference of
// two numbers as large as mean / deviation, each with its own rounding.
//
// Shapes: rows of `columns` adjacent values (../channel_affine.cpp joins pixels into longer rows where memory allows),
// each tensor with its own row stride. Without vectors every value is multiplied by `factor`.
//
// Work: a task owns `rows_per_task` rows. Each value is read once, kept in a register, and written once; the vectors
// stay in L1. y may be x or the residual.
//
// Floor: bytes of x, residual and y.

#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

template <typename T, bool HasVectors, bool HasCentre, bool HasResidual>
static void run_task(const ChannelAffineProblem& problem, int64_t index) {
  const int64_t first = index * problem.rows_per_task;
  const int64_t last = first + problem.rows_per_task < problem.rows ? first + problem.rows_per_task : problem.rows;
  const int64_t columns = problem.columns;
  const Vector factor = broadcast(problem.factor);
  // ReLU as a lower bound, minus infinity without one. A NaN is not below it and stays.
  const Vector bound = broadcast(problem.relu ? 0.0f : -__builtin_inff());
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(problem.input) + row * problem.input_stride;
    const T* residual = static_cast<const T*>(problem.residual) + (HasResidual ? row * problem.residual_stride : 0);
    T* y = static_cast<T*>(problem.out) + row * problem.out_stride;
    int64_t c = 0;
    for (; c + kVectorWidth <= columns; c += kVectorWidth) {
      Vector value = load(x + c);
      if (HasCentre) value -= load(problem.centre + c);
      value = HasVectors ? value * load(problem.scale + c) + load(problem.shift + c) : value * factor;
      if (HasResidual) value += load(residual + c);
      store(y + c, value < bound ? bound : value);
    }
    for (; c < columns; ++c) {
      float value = load_one(x + c);
      if (HasCentre) value -= problem.centre[c];
      value = HasVectors ? value * problem.scale[c] + problem.shift[c] : value * problem.factor;
      if (HasResidual) value += load_one(residual + c);
      store_one(y + c, problem.relu ? relu(value) : value);
    }
  }
}

template <typename T>
static void run_task(const ChannelAffineProblem& problem, int64_t index) {
  const bool has_vectors = problem.scale != nullptr, has_residual = problem.residual != nullptr;
  if (problem.centre != nullptr) {
    has_residual ? run_task<T, true, true, true>(problem, index) : run_task<T, true, true, false>(problem, index);
  } else if (has_vectors) {
    has_residual ? run_task<T, true, false, true>(problem, index) : run_task<T, true, false, false>(problem, index);
  } else {
    has_residual ? run_task<T, false, false, true>(problem, index) : run_task<T, false, false, false>(problem, index);
  }
}

}  // namespace

void channel_affine_task(const ChannelAffineProblem& problem, int64_t index) {
  if (problem.dtype == DType::f32) {
    run_task<float>(problem, index);
  } else {
    run_task<uint16_t>(problem, index);
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
