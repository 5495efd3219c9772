// channel_affine and residual_add on the CPU: rows, vectors and the cut into tasks. The arithmetic is in
// isa/channel_affine.cpp.
#include <algorithm>
#include <memory>

#include "isa/table.h"
#include "kernels.h"
#include "preparation.h"
#include "work.h"

namespace fastcnn::cpu {
namespace {

Work work_of(ChannelAffineProblem problem, const std::shared_ptr<float>& vectors, int threads) {
  constexpr int64_t kTasksPerThread = 4, kValuesPerTask = 1 << 14;
  const int64_t values = problem.rows * problem.columns;
  const int64_t wanted = std::clamp<int64_t>(values / kValuesPerTask, 1, kTasksPerThread * threads);
  problem.rows_per_task = ceil_div(problem.rows, wanted);
  const int64_t tasks = ceil_div(problem.rows, problem.rows_per_task);
  return {tasks, threads, 0, [problem, vectors](int64_t task, void*) { kernels().channel_affine_task(problem, task); }};
}

// Pixels [first, first + rows * group) as `rows` rows of `group` pixels each.
ChannelAffineProblem rows_of(const TensorView& out, const TensorView& input, const TensorView& residual, bool relu,
                             int64_t first, int64_t rows, int64_t group) {
  const int64_t item = size_in_bytes(input.dtype);
  const auto at = [&](const TensorView& t) { return static_cast<char*>(t.data) + first * t.pixel_stride * item; };
  ChannelAffineProblem problem;
  problem.out = at(out), problem.out_stride = out.pixel_stride * group;
  problem.input = at(input), problem.input_stride = input.pixel_stride * group;
  problem.residual = residual ? at(residual) : nullptr, problem.residual_stride = residual.pixel_stride * group;
  problem.dtype = input.dtype;
  problem.rows = rows, problem.columns = input.c * group;
  problem.scale = problem.shift = problem.centre = nullptr;
  problem.factor = 1.0f;
  problem.relu = relu;
  return problem;
}

bool is_dense(const TensorView& t) {
  return !t || t.pixel_stride == t.c;
}

}  // namespace

Works channel_affine_work(const TensorView& out, const TensorView& input, const float* scale, const float* shift,
                          const float* centre, const TensorView& residual, Activation activation, float factor,
                          int threads) {
  const bool relu = activation == Activation::relu;
  const bool dense = is_dense(out) && is_dense(input) && is_dense(residual);
  const bool vectors = scale != nullptr || shift != nullptr || centre != nullptr;
  const int64_t width = kernels().vector_width, pixels = input.pixels();
  // Where pixels lie without gaps, several make one row: a few thousand values if no value knows its channel, else as
  // many as make whole vectors of channels that do not (the vectors are then repeated as often).
  int64_t group = 1;
  if (dense && !vectors) group = std::max<int64_t>(4096 / input.c, 1);
  if (dense && vectors && input.c % width != 0 && input.c < 256) group = width;
  group = std::min(group, pixels);

  std::shared_ptr<float> repeated;
  if (vectors) {
    const int64_t length = input.c * group;
    repeated.reset(static_cast<float*>(allocate_aligned((centre != nullptr ? 3 : 2) * length * 4)), std::free);
    float* to = repeated.get();
    for (int64_t i = 0; i < length; i += input.c) {
      if (centre != nullptr) std::copy_n(centre, input.c, to + 2 * length + i);
      scale != nullptr ? std::copy_n(scale, input.c, to + i) : std::fill_n(to + i, input.c, 1.0f);
      shift != nullptr ? std::copy_n(shift, input.c, to + length + i) : std::fill_n(to + length + i, input.c, 0.0f);
    }
  }
  const int64_t rows = pixels / group, rest = pixels % group;
  Works works;
  const auto add = [&](ChannelAffineProblem problem) {
    if (problem.rows == 0) return;
    problem.factor = factor;
    problem.scale = repeated.get();
    problem.shift = vectors ? repeated.get() + input.c * group : nullptr;
    problem.centre = centre != nullptr ? repeated.get() + 2 * input.c * group : nullptr;
    works.push_back(work_of(problem, repeated, threads));
  };
  add(rows_of(out, input, residual, relu, 0, rows, group));
  if (rest > 0) add(rows_of(out, input, residual, relu, rows * group, 1, rest));
  return works;
}

void channel_affine(const TensorView& out, const TensorView& input, const float* scale, const float* shift,
                    const float* centre, const TensorView& residual, Activation activation, float factor, int threads) {
  run_now(channel_affine_work(out, input, scale, shift, centre, residual, activation, factor, threads));
}

}  // namespace fastcnn::cpu
