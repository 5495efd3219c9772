// The table of AVX-512 with bf16 dot products: that of AVX-512, and the kernels that compute in bf16.
#include "variant_bf16.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr Bf16Kernels kBf16Kernels = {conv2d_bf16_scratch_bytes,   conv2d_bf16_task,   conv2d_grouped_bf16_task,
                                      winograd_bf16_scratch_bytes, winograd_bf16_task, linear_few_rows_bf16_task,
                                      linear_short_bf16_task};

KernelTable extended() {
  KernelTable table = avx512::kernel_table();
  table.name = "avx512_bf16";
  table.bf16 = &kBf16Kernels;
  return table;
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table = extended();
  return table;
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
