// Local response normalisation on the CPU: the cut into tasks. The arithmetic is in isa/local_response_norm.cpp.
#include <algorithm>

#include "isa/table.h"
#include "kernels.h"
#include "work.h"

namespace fastcnn::cpu {

Works local_response_norm_work(const TensorView& out, const TensorView& input, int64_t size, float alpha, float beta,
                               float k, int threads) {
  const KernelTable& table = kernels();
  // A window wider than all channels to either side is the same as one that just reaches them.
  LocalResponseNormProblem problem;
  problem.out = out;
  problem.input = input;
  problem.alpha_over_size = alpha / static_cast<float>(size);
  problem.size = std::min<int64_t>(size, 2 * input.c + 1);
  problem.beta = beta;
  problem.k = k;
  constexpr int64_t kValuesPerTask = 16 * 1024;
  problem.pixels_per_task = std::max<int64_t>(kValuesPerTask / input.c, 1);
  const int64_t tasks = (out.pixels() + problem.pixels_per_task - 1) / problem.pixels_per_task;
  return {{tasks, threads, table.local_response_norm_scratch_bytes(problem),
           [problem, &table](int64_t task, void* scratch) { table.local_response_norm_task(problem, task, scratch); }}};
}

void local_response_norm(const TensorView& out, const TensorView& input, int64_t size, float alpha, float beta, float k,
                         int threads) {
  run_now(local_response_norm_work(out, input, size, alpha, beta, k, threads));
}

}  // namespace fastcnn::cpu
