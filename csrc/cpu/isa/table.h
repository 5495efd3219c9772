// What each instruction-set variant provides. The files of isa/ are compiled once per instruction set, each time into a
// namespace of its own (FASTCNN_ISA), and reached only through this table of functions, so that no instruction of a
// newer set is ever met on an older processor.
//
// Rule for isa/*.cpp: no std:: containers, streams or exceptions. An inline library function that the compiler emits
// out of line there could be picked by the linker for everybody. Memory comes from the caller.
#pragma once

#include <cstdint>

#include "../../common/types.h"

namespace fastcnn::cpu {

// One convolution, ready to run. Filled by conv2d.cpp.
struct Conv2dProblem {
  TensorView out, input;
  Conv2dGeometry geometry;
  const float* packed_weight;
  int64_t group_in, group_out, column_blocks;
  // Prologue vectors have `in_channels` values or are null; epilogue vectors are padded to whole column blocks.
  const float* input_scale;
  const float* input_shift;
  bool input_relu;
  const float* scale;
  const float* bias;
  TensorView residual;
  bool relu;
  // How the work is cut: see isa/conv2d.cpp.
  int64_t chunk;            // reduction values per pass
  int64_t tile_rows;        // output pixels per task
  int64_t blocks_per_task;  // column blocks per task
};

// One Winograd convolution, ready to run. Filled by conv2d_winograd.cpp.
struct WinogradProblem {
  TensorView out, input;
  int64_t pad_top, pad_left;
  int tile;  // outputs to a tile's side, 4 or 2
  const float* packed_weight;
  int64_t channel_vectors, column_blocks;
  // Prologue vectors have `in_channels` values or are null; epilogue vectors are padded to whole column blocks.
  const float* input_scale;
  const float* input_shift;
  bool input_relu;
  const float* scale;
  const float* bias;
  TensorView residual;
  bool relu;
  // How the work is cut: see isa/conv2d_winograd.cpp.
  int64_t tiles_h, tiles_w, tiles;  // in an image's height and width; in the batch
  int64_t tiles_per_block, blocks;
  float* shared_input;       // this and the next: only where the transformed input is shared
  int64_t vectors_per_task;  // channel vectors to an input task
};

enum class PoolKind : int32_t { max, average, adaptive };

// One pooling, ready to run. Filled by pool2d.cpp.
struct Pool2dProblem {
  TensorView out, input;
  Pool2dGeometry geometry;  // not for PoolKind::adaptive
  PoolKind kind;
  // PoolKind::average only.
  int64_t pad_bottom, pad_right;
  bool count_include_pad;
  int64_t divisor;  // 0: the window's size
  // How the work is cut: see isa/pool2d.cpp.
  int64_t rows_per_task, channels_per_task;
};

// One local response normalisation, ready to run. Filled by local_response_norm.cpp.
struct LocalResponseNormProblem {
  TensorView out, input;
  int64_t size;
  float alpha_over_size, beta, k;
  int64_t pixels_per_task;
};

// Input rows up to which a fully connected layer is computed as dot products: see isa/linear.cpp.
constexpr int64_t kLinearFewRows = 8;
constexpr int64_t kLinearChunk = 256;  // reduction values per packing task and per pass of the matrix product

// One fully connected layer, ready to run. Filled by linear.cpp.
struct LinearProblem {
  void* out;
  const void* input;
  const void* weight;
  int64_t out_stride, input_stride, weight_stride;  // from one row to the next
  DType dtype;
  int64_t rows, columns, depth;  // M, K, C
  const float* bias;
  bool relu;
  float* packed_input;  // for many rows: room for [panel][c][column_block]; null for few
  int64_t columns_per_task, panels_per_task;
};

// One element-wise pass, ready to run. Filled by channel_affine.cpp.
struct ChannelAffineProblem {
  void* out;
  const void* input;
  const void* residual;
  int64_t out_stride, input_stride, residual_stride;  // from one row to the next
  DType dtype;
  int64_t rows, columns;
  const float* scale;  // both vectors have `columns` values, or are null and every value is multiplied by `factor`
  const float* shift;
  float factor;
  bool relu;
  int64_t rows_per_task;
};

// Sums over the pixels of a batch. Filled by batch_statistics.cpp.
struct BatchStatisticsProblem {
  TensorView input;
  double* sum;  // [row task][c]
  double* m2;   // [row task][c], sums of squares about the row task's own mean
  int64_t pixels_per_task, pixels_per_block, channels_per_task;
};

struct Bf16Kernels;

struct KernelTable {
  const char* name;
  int vector_width;  // floats per vector
  int micro_rows;    // output pixels per micro-tile
  int column_block;  // output channels per micro-tile
  int max_chunk;     // largest reduction chunk a gathered panel holds
  // Bytes of scratch one thread needs for a problem.
  int64_t (*conv2d_scratch_bytes)(const Conv2dProblem&);
  // Runs task `index` of the problem with this thread's scratch (64-byte aligned).
  void (*conv2d_task)(const Conv2dProblem&, int64_t index, void* scratch);
  void (*conv2d_grouped_task)(const Conv2dProblem&, int64_t index);
  int64_t (*winograd_input_bytes)(const WinogradProblem&);    // transformed input of a tile block
  int64_t (*winograd_product_bytes)(const WinogradProblem&);  // products of a tile block and a column block
  void (*winograd_fused_task)(const WinogradProblem&, int64_t index, void* scratch);  // scratch: input, then products
  void (*winograd_input_task)(const WinogradProblem&, int64_t index);
  void (*winograd_product_task)(const WinogradProblem&, int64_t index, void* scratch);  // scratch: products
  void (*pool2d_task)(const Pool2dProblem&, int64_t index);
  int64_t (*local_response_norm_scratch_bytes)(const LocalResponseNormProblem&);
  void (*local_response_norm_task)(const LocalResponseNormProblem&, int64_t index, void* scratch);
  int64_t (*linear_scratch_bytes)(const LinearProblem&);
  void (*linear_pack_task)(const LinearProblem&, int64_t index);
  void (*linear_task)(const LinearProblem&, int64_t index, void* scratch);
  void (*channel_affine_task)(const ChannelAffineProblem&, int64_t index);
  void (*batch_statistics_task)(const BatchStatisticsProblem&, int64_t index);
  const Bf16Kernels* bf16;  // conv2d_bf16.h; null where the processor has no bf16 dot products
};

namespace portable {
const KernelTable& kernel_table();
}
namespace avx2 {
const KernelTable& kernel_table();
}
namespace avx512 {
const KernelTable& kernel_table();
}
namespace avx512_bf16 {
const KernelTable& kernel_table();
}

const KernelTable& kernels();  // the table in use

}  // namespace fastcnn::cpu
