// The table of one instruction-set variant.
#include "table.h"

#include "machine_costs.h"
#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {

#define FASTCNN_STRING(x) #x
#define FASTCNN_NAME(x) FASTCNN_STRING(x)

const KernelTable& kernel_table() {
  static constexpr KernelTable table = {
      FASTCNN_NAME(FASTCNN_ISA),
      kVectorWidth,
      kMicroRows,
      kColumnBlock,
      kConv2dMaxChunk,
      kPermutes,
      conv2d_scratch_bytes,
      conv2d_task,
      conv2d_grouped_scratch_bytes,
      conv2d_grouped_task,
      winograd_scratch_bytes,
      winograd_task,
      winograd_plain_scratch_bytes,
      winograd_plain_task,
      winograd_grouped_scratch_bytes,
      winograd_grouped_task,
      winograd_rows_scratch_bytes,
      winograd_rows_task,
      strassen_scratch_bytes,
      strassen_task,
      pool2d_task,
      local_response_norm_scratch_bytes,
      local_response_norm_task,
      linear_scratch_bytes,
      linear_pack_task,
      linear_few_rows_task,
      linear_many_rows_task,
#if defined(__AVX2__)
      linear_short_task,
      linear_by_input_scratch_bytes,
      linear_by_input_task,
#else
      nullptr,
      nullptr,
      nullptr,
#endif
      channel_affine_task,
      map_block,
      rows_task,
      batch_statistics_task,
      fma_loop,
      bf16_dot_loop,
      read_loop,
      nullptr,
      kShortFormat,
      machine_costs(),
  };
  return table;
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
