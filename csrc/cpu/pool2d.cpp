// Pooling on the CPU: the cut into tasks. The arithmetic is in isa/pool2d.cpp.
#include <algorithm>

#include "isa/table.h"
#include "kernels.h"
#include "preparation.h"
#include "work.h"

namespace fastcnn::cpu {
namespace {

// Below this many values read, a second thread costs more than it saves (starting a team: some microseconds).
constexpr int64_t kValuesPerThread = 32 * 1024;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kLeastChannelsPerTask = 128;

Works pool2d(Pool2dProblem problem, int64_t taps, int threads) {
  const KernelTable& table = kernels();
  const int64_t rows = problem.out.n * problem.out.h, channels = problem.out.c;
  const int64_t values = problem.out.pixels() * channels * taps;
  threads = static_cast<int>(std::clamp<int64_t>(values / kValuesPerThread, 1, threads));
  const int64_t wanted = threads > 1 ? threads * kTasksPerThread : 1;
  problem.rows_per_task = std::max<int64_t>(rows / wanted, 1);
  const int64_t row_tasks = ceil_div(rows, problem.rows_per_task);
  // Channel blocks are whole cache lines, and only as many as the rows leave to be wanted.
  const int64_t splits = std::clamp<int64_t>(wanted / row_tasks, 1, ceil_div(channels, kLeastChannelsPerTask));
  problem.channels_per_task = ceil_div(ceil_div(channels, splits), 64) * 64;
  const int64_t tasks = row_tasks * ceil_div(channels, problem.channels_per_task);
  return {{tasks, threads, 0, [problem, &table](int64_t task, void*) { table.pool2d_task(problem, task); }}};
}

}  // namespace

Works max_pool2d_work(const TensorView& out, const TensorView& input, const Pool2dGeometry& geometry, int threads) {
  Pool2dProblem problem = {};
  problem.out = out;
  problem.input = input;
  problem.geometry = geometry;
  problem.kind = PoolKind::max;
  return pool2d(problem, std::min(geometry.kernel_h, input.h) * std::min(geometry.kernel_w, input.w), threads);
}

Works avg_pool2d_work(const TensorView& out, const TensorView& input, const Pool2dGeometry& geometry,
                      int64_t pad_bottom, int64_t pad_right, bool count_include_pad, int64_t divisor, int threads) {
  Pool2dProblem problem = {};
  problem.out = out;
  problem.input = input;
  problem.geometry = geometry;
  problem.geometry.dilation_h = problem.geometry.dilation_w = 1;
  problem.kind = PoolKind::average;
  problem.pad_bottom = pad_bottom;
  problem.pad_right = pad_right;
  problem.count_include_pad = count_include_pad;
  problem.divisor = divisor;
  return pool2d(problem, std::min(geometry.kernel_h, input.h) * std::min(geometry.kernel_w, input.w), threads);
}

Works adaptive_avg_pool2d_work(const TensorView& out, const TensorView& input, int threads) {
  Pool2dProblem problem = {};
  problem.out = out;
  problem.input = input;
  problem.kind = PoolKind::adaptive;
  return pool2d(problem, ceil_div(input.h, out.h) * ceil_div(input.w, out.w), threads);
}

void max_pool2d(const TensorView& out, const TensorView& input, const Pool2dGeometry& geometry, int threads) {
  run_now(max_pool2d_work(out, input, geometry, threads));
}

void avg_pool2d(const TensorView& out, const TensorView& input, const Pool2dGeometry& geometry, int64_t pad_bottom,
                int64_t pad_right, bool count_include_pad, int64_t divisor, int threads) {
  run_now(avg_pool2d_work(out, input, geometry, pad_bottom, pad_right, count_include_pad, divisor, threads));
}

void adaptive_avg_pool2d(const TensorView& out, const TensorView& input, int threads) {
  run_now(adaptive_avg_pool2d_work(out, input, threads));
}

}  // namespace fastcnn::cpu
