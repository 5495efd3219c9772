// Batch statistics on the CPU: the cut into tasks, and the merge of their results. The sums are in
// isa/batch_statistics.cpp.
#include <algorithm>
#include <cmath>
#include <memory>

#include "isa/table.h"
#include "kernels.h"
#include "parallel.h"
#include "preparation.h"

namespace fastcnn::cpu {
void batch_statistics(double* mean, double* var, const TensorView& input, int threads) {
  // Nothing here depends on `threads`: the same sums in the same order, whoever computes them.
  constexpr int64_t kMaxRowTasks = 32, kChannelsPerTask = 256, kBlockValues = 16384;
  BatchStatisticsProblem problem;
  problem.input = input;
  problem.channels_per_task = kChannelsPerTask;
  const int64_t pixels = input.pixels();
  problem.pixels_per_block = std::clamp<int64_t>(kBlockValues / std::min(input.c, kChannelsPerTask), 32, 128);
  const int64_t blocks = ceil_div(pixels, problem.pixels_per_block);
  problem.pixels_per_task = ceil_div(blocks, std::min(blocks, kMaxRowTasks)) * problem.pixels_per_block;
  const int64_t row_tasks = ceil_div(pixels, problem.pixels_per_task);
  const int64_t channels = input.c;
  std::unique_ptr<double, void (*)(void*)> partial(static_cast<double*>(allocate_aligned(2 * row_tasks * channels * 8)),
                                                   std::free);
  problem.sum = partial.get();
  problem.m2 = partial.get() + row_tasks * channels;

  constexpr int64_t kSerialWork = 1 << 14;  // values not worth waking a thread for
  if (pixels * channels <= kSerialWork) threads = 1;
  parallel_tasks(row_tasks * ceil_div(channels, kChannelsPerTask), threads, 0,
                 [&](int64_t task, void*) { kernels().batch_statistics_task(problem, task); });

  double* sum = problem.sum;
  double* m2 = problem.m2;
  for (int64_t task = 1; task < row_tasks; ++task) {
    const int64_t earlier = task * problem.pixels_per_task;
    const int64_t here = std::min(problem.pixels_per_task, pixels - earlier);
    const double per_earlier = 1.0 / static_cast<double>(earlier), per_here = 1.0 / static_cast<double>(here);
    const double weight = 1.0 / (per_earlier + per_here);
    const double* task_sum = problem.sum + task * channels;
    const double* task_m2 = problem.m2 + task * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = task_sum[c] * per_here - sum[c] * per_earlier;
      sum[c] += task_sum[c];
      m2[c] += task_m2[c] + delta * delta * weight;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = sum[c] / static_cast<double>(pixels);
    var[c] = m2[c] / static_cast<double>(pixels);
  }
}

void batch_norm_vectors(float* centre, float* scale, float* shift, const double* mean, const double* var,
                        const float* weight, const float* bias, double eps, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    const double factor = (weight != nullptr ? weight[c] : 1.0) / std::sqrt(var[c] + eps);
    const double start = bias != nullptr ? bias[c] : 0.0;
    centre[c] = static_cast<float>(mean[c]);
    scale[c] = static_cast<float>(factor);
    shift[c] = static_cast<float>(start - (mean[c] - static_cast<double>(centre[c])) * factor);
  }
}

}  // namespace fastcnn::cpu
