// A fully connected layer on the CPU: the cut into tasks. The arithmetic is in isa/linear.cpp and isa/linear_bf16.cpp.
#include <algorithm>
#include <memory>

#include "isa/conv2d_bf16.h"
#include "isa/table.h"
#include "kernels.h"
#include "preparation.h"
#include "work.h"
#include "workspace.h"

namespace fastcnn::cpu {
int64_t linear_workspace_bytes(int64_t rows, int64_t depth) {
  if (rows <= kLinearFewRows) return 0;
  const int64_t block = kernels().column_block;
  return ceil_div(rows, block) * block * depth * 4;
}

Works linear_work(const TensorView& out, const TensorView& input, const TensorView& weight, const float* bias,
                  Activation activation, int threads, const std::shared_ptr<Workspace>& workspace) {
  const KernelTable& table = kernels();
  LinearProblem problem;
  problem.out = out.data, problem.out_stride = out.pixel_stride;
  problem.input = input.data, problem.input_stride = input.pixel_stride;
  problem.weight = weight.data, problem.weight_stride = weight.pixel_stride;
  problem.dtype = input.dtype;
  problem.rows = input.n, problem.columns = weight.n, problem.depth = input.c;
  problem.bias = bias;
  problem.relu = activation == Activation::relu;

  constexpr int64_t kSerialWork = 1 << 15;  // multiplications not worth waking a thread for
  constexpr int64_t kTasksPerThread = 4;
  if (problem.rows * problem.columns * problem.depth <= kSerialWork) threads = 1;
  const int64_t wanted = kTasksPerThread * threads;

  if (problem.rows <= kLinearFewRows) {
    problem.columns_per_task = threads == 1
                                   ? kLinearFewRowsColumns
                                   : std::clamp<int64_t>(problem.columns / wanted / 4 * 4, 4, kLinearFewRowsColumns);
    const int64_t tasks = ceil_div(problem.columns, problem.columns_per_task);
    if (problem.dtype == DType::bf16 && table.bf16 != nullptr) {
      return {{tasks, threads, 0,
               [problem, &table](int64_t task, void*) { table.bf16->linear_few_rows_task(problem, task); }}};
    }
    return {{tasks, threads, 0, [problem, &table](int64_t task, void*) { table.linear_few_rows_task(problem, task); }}};
  }

  const int64_t panels = ceil_div(problem.rows, table.column_block);
  workspace->reserve(linear_workspace_bytes(problem.rows, problem.depth));
  // At most 8 panels, whose chunk fits into L2, and 4 blocks of weight rows, which share it; fewer to give every thread
  // some tasks.
  problem.panels_per_task = ceil_div(panels, ceil_div(panels, 8));
  const int64_t blocks = ceil_div(problem.columns, table.micro_rows);
  const int64_t panel_tasks = ceil_div(panels, problem.panels_per_task);
  problem.columns_per_task = std::clamp<int64_t>(blocks * panel_tasks / wanted, 1, 4) * table.micro_rows;
  const int64_t tasks = panel_tasks * ceil_div(problem.columns, problem.columns_per_task);
  const Work pack = {panels * ceil_div(problem.depth, kLinearChunk), threads, 0,
                     [problem, workspace, &table](int64_t task, void*) {
                       table.linear_pack_task(problem, static_cast<float*>(workspace->data()), task);
                     }};
  const Work multiply = {tasks, threads, table.linear_scratch_bytes(problem),
                         [problem, workspace, &table](int64_t task, void* scratch) {
                           table.linear_many_rows_task(problem, static_cast<float*>(workspace->data()), task, scratch);
                         }};
  return {pack, multiply};
}

void linear(const TensorView& out, const TensorView& input, const TensorView& weight, const float* bias,
            Activation activation, int threads) {
  run_now(linear_work(out, input, weight, bias, activation, threads, std::make_shared<Workspace>()));
}

}  // namespace fastcnn::cpu
