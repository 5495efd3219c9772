// The cut of layer normalisation and softmax into tasks.
#include "rows.h"

#include <algorithm>

#include "isa/table.h"
#include "preparation.h"

namespace fastcnn::cpu {
namespace {

Works work_of(RowsProblem problem, const TensorView& out, const TensorView& input, int threads) {
  constexpr int64_t kValuesPerTask = 1 << 13;
  problem.dtype = out.dtype;
  problem.out = out.data, problem.out_stride = out.pixel_stride;
  problem.input = input.data, problem.input_stride = input.pixel_stride;
  problem.rows = out.n, problem.columns = out.c;
  problem.rows_per_task = std::clamp<int64_t>(kValuesPerTask / problem.columns, 1, problem.rows);
  const KernelTable& table = kernels();
  return {{ceil_div(problem.rows, problem.rows_per_task), threads, 0,
           [problem, &table](int64_t task, void*) { table.rows_task(problem, task); }}};
}

}  // namespace

Works layer_norm_work(const TensorView& out, const TensorView& input, const float* weight, const float* bias, float eps,
                      int threads) {
  RowsProblem problem = {};
  problem.kind = RowsKind::layer_norm;
  problem.weight = weight, problem.bias = bias, problem.eps = eps;
  return work_of(problem, out, input, threads);
}

Works softmax_work(const TensorView& out, const TensorView& input, int threads) {
  RowsProblem problem = {};
  problem.kind = RowsKind::softmax;
  return work_of(problem, out, input, threads);
}

}  // namespace fastcnn::cpu
