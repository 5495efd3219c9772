// The cut into tasks of a fully connected layer with one input row whose weights lie by input value. The arithmetic is
// in isa/linear_by_input.cpp.
#include "linear_by_input.h"

#include "isa/table.h"
#include "preparation.h"

namespace fastcnn::cpu {

Works linear_by_input_work(const TensorView& out, const TensorView& input, const ShortLinearWeight& weight,
                           const float* bias, Activation activation, int threads) {
  constexpr int64_t kTasksPerThread = 1, kLeastColumns = 256;
  const KernelTable& table = kernels();
  LinearByInputProblem p;
  p.out = static_cast<float*>(out.data);
  p.input = static_cast<const float*>(input.data);
  p.columns = weight.columns, p.depth = weight.depth;
  p.bias = bias;
  p.relu = activation == Activation::relu;
  p.first_exponent = weight.header().first_exponent;
  p.blocks = weight.blocks();
  p.first_exception = weight.first_exception();
  p.exceptions = reinterpret_cast<const LinearException*>(weight.exceptions());
  p.block_columns = weight.group_columns();
  p.parts = 1;
  while (weight.groups() * p.parts < kTasksPerThread * threads && p.block_columns / p.parts >= 2 * kLeastColumns) {
    p.parts *= 2;
  }
  Work work;
  work.tasks = weight.groups() * p.parts;
  work.threads = threads;
  work.scratch_bytes = table.linear_by_input_scratch_bytes(p);
  work.run = [p, run = table.linear_by_input_task](int64_t task, void* scratch) { run(p, task, scratch); };
  work.constants = p.blocks;
  work.constant_bytes = weight.blocks_bytes();
  return {work};
}

}  // namespace fastcnn::cpu
