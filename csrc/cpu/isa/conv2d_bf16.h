// What processors with bf16 dot products (AVX512-BF16) provide beside the table of table.h: convolution of bf16 tensors
// in bf16 arithmetic. The arithmetic is in isa/conv2d_bf16.cpp, isa/conv2d_grouped_bf16.cpp and
// isa/conv2d_winograd_bf16.cpp, packing and the cut into tasks in conv2d_bf16.cpp and conv2d_winograd.cpp.
#pragma once

#include <cstdint>

#include "../../common/types.h"

namespace fastcnn::cpu {

constexpr int64_t kBf16MicroRows = 14;    // output pixels per micro-tile: 14 x 2 accumulators of 32 registers
constexpr int64_t kBf16ColumnBlock = 32;  // output channels per micro-tile
constexpr int64_t kBf16MaxChunk = 4608;   // reduction values per pass, even
constexpr int64_t kBf16MaxTiles = 64;     // micro-tiles per task
constexpr int64_t kBf16MaxUnits = 16;  // units of rows per task: output rows where there is a strip, else micro-tiles

// Where the micro-kernel reads its input: see isa/conv2d_bf16.cpp.
enum class Bf16Path : int32_t { in_place, strip, panel };

// One convolution, ready to run. Filled by conv2d_bf16.cpp.
struct Conv2dBf16Problem {
  TensorView out, input;
  Conv2dGeometry geometry;
  const uint16_t* packed_weight;
  int64_t group_in, group_out, column_blocks;
  // Prologue vectors have `in_channels` values or are null; epilogue vectors are padded to whole column blocks.
  const float* input_scale;
  const float* input_shift;
  bool input_relu;
  const float* scale;
  const float* bias;
  TensorView residual;
  bool relu;
  // How the work is cut: see isa/conv2d_bf16.cpp.
  Bf16Path path;
  int64_t row_values;       // reduction values of a filter row, and a zero where that number is odd
  int64_t chunk;            // reduction values per pass, even; not for a strip
  int64_t panel_stride;     // values from one pixel of a panel to the next
  int64_t strip_pixels;     // input pixels of a strip's row, with padding
  int64_t strip_pitch;      // values from one row of a strip to the next
  int64_t tile_rows;        // output pixels per task; of a strip, output rows of one image
  int64_t row_tasks;        // tasks that cover the output's pixels
  int64_t blocks_per_task;  // column blocks per task
};

struct LinearProblem;  // table.h
struct LinearShortProblem;
struct WinogradProblem;

// The entries of an instruction set with bf16 dot products.
struct Bf16Kernels {
  int64_t (*conv2d_scratch_bytes)(const Conv2dBf16Problem&);
  void (*conv2d_task)(const Conv2dBf16Problem&, int64_t index, void* scratch);
  void (*conv2d_grouped_task)(const Conv2dBf16Problem&, int64_t index);
  int64_t (*winograd_scratch_bytes)(const WinogradProblem&);  // tiles of 2x2, weights in pairs
  void (*winograd_task)(const WinogradProblem&, int64_t index, void* scratch);
  void (*linear_few_rows_task)(const LinearProblem&, int64_t index);
  void (*linear_short_task)(const LinearShortProblem&, int64_t index);
};

}  // namespace fastcnn::cpu
