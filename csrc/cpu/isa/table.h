// What each instruction-set variant provides. The files of isa/ are compiled once per instruction set, each time into a
// namespace of its own (FASTCNN_ISA), and reached only through this table of functions, so that no instruction of a
// newer set is ever met on an older processor.
//
// Rule for isa/*.cpp: no std:: containers, streams or exceptions. An inline library function that the compiler emits
// out of line there could be picked by the linker for everybody. Memory comes from the caller.
#pragma once

#include <cstdint>

#include "../../common/types.h"
#include "costs.h"

namespace fastcnn::cpu {

// Where a direct convolution's inner loop reads its input: see isa/conv2d.cpp.
enum class ConvSource : int32_t { in_place, strip, panel };
constexpr int kMaxTaskPixels = 224;  // about as many output pixels a task has at most, in micro-tiles

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
  // How the work is cut: see isa/conv2d.cpp and isa/conv2d_grouped.cpp.
  ConvSource source;
  int64_t chunk;                      // reduction values per pass; not of a strip
  int64_t tile_rows;                  // per task: output pixels, or output rows of a strip
  int64_t row_tasks;                  // tasks that the output pixels make
  int64_t blocks_per_task;            // column blocks per task
  int64_t strip_pixels, strip_pitch;  // of a strip's rows: pixels that are read, floats from one to the next
  bool prefetch_input;                // fetch the next task's pixels ahead, not the next weights
  bool max_pool;                      // `out` is the maximum of each 2x2 window; where narrow or row_pairs only
  bool row_pairs;                     // a strip's column blocks of one vector: see isa/conv2d_row_pairs.h
  // Few output channels, from a strip: see isa/conv2d_narrow.h, where this is explained. Else null.
  const uint32_t* narrow_lanes;

  bool has_prologue() const { return input_scale != nullptr || input_shift != nullptr || input_relu; }
  // What is convolved for so many output rows or columns.
  int64_t convolved(int64_t count) const { return max_pool ? 2 * count : count; }
  // Input rows that `rows` output rows read.
  int64_t input_rows(int64_t rows) const {
    return (convolved(rows) - 1) * geometry.stride_h + (geometry.filter_h - 1) * geometry.dilation_h + 1;
  }
};

// Adjacent lanes of one vector of a transformed input, each multiplied by a row of weights.
struct WinogradRun {
  int32_t vector, first, count;
};

struct WinogradRuns {
  const WinogradRun* data;
  int64_t count;
};

// One Winograd convolution, ready to run. Filled by conv2d_winograd.cpp.
struct WinogradProblem {
  TensorView out, input;
  int64_t pad_top, pad_left;
  int stride;
  int tile, side;  // to a tile's side: outputs; points, and inputs of one phase
  const float* packed_weight;
  int64_t groups;                          // of plain and grouped kernels only, whose column block is a vector
  int64_t channel_vectors, column_blocks;  // a vector holds twice as many channels where weights are bf16 pairs
  bool half_transformed;                   // weights, of plain kernels only: isa/conv2d_winograd_half.h
  int rows_per_vector;                     // phases' rows that share a vector; 0: a vector holds channels of one phase
  // What is multiplied at a point that is not at infinity, in its column, in its row, in both; rows of a column block's
  // weights before each point.
  WinogradRuns runs[4];
  const int64_t* point_words;
  // Prologue vectors have `in_channels` values or are null; epilogue vectors are padded to whole column blocks.
  const float* input_scale;
  const float* input_shift;
  bool input_relu;
  const float* scale;
  const float* bias;
  TensorView residual;
  bool relu;
  bool max_pool;  // `out` is the maximum of each 2x2 window of the convolution's output; no residual then
  // How the work is cut: see isa/conv2d_winograd.cpp.
  int64_t tiles_h, tiles_w;  // in an image's height and width
  // Of them the last ones that are an output short, and have no point at infinity: see isa/conv2d_winograd.cpp.
  int64_t short_h = 0, short_w = 0;
  int64_t tiles;  // in the batch
  int64_t tiles_per_block, blocks, columns_per_task;
  int64_t columns_at_once;  // column blocks whose products are formed before they go back
  // No thread has a task after its first: what others will read is not brought from their caches.
  bool one_task_each = false;
};

// Output channels that isa/conv2d_narrow.h serves at most: those whose sums of two vectors of pixels fit the registers,
// and which leave lanes idle where channels lie across them.
constexpr int narrow_channels(int vector_width) {
  return vector_width == 8 ? 6 : vector_width > 1 ? vector_width / 2 : 1;
}

// Outputs of a row that make a tile of isa/conv2d_winograd_rows.cpp, by the stride.
constexpr int winograd_row_tile(int stride) {
  return stride == 1 ? 2 : 4;
}

// One Winograd convolution along rows, ready to run. Filled by conv2d_winograd_rows.cpp.
struct WinogradRowsProblem {
  TensorView out, input;
  int64_t pad_top, pad_left;
  int filter, stride;
  int side;                   // points to a tile
  int64_t words, last_words;  // of a filter row's reduction; those at the point infinity
  const float* packed_weight;
  int64_t column_blocks;
  // Prologue vectors have `in_channels` values or are null; epilogue vectors are padded to whole column blocks.
  const float* input_scale;
  const float* input_shift;
  bool input_relu;
  const float* scale;
  const float* bias;
  TensorView residual;
  bool relu;
  bool max_pool;  // `out` is the maximum of each 2x2 window; tiles of 2 outputs only, and no residual
  // How the work is cut. Rows are those of the convolution, in pairs where they are pooled.
  int64_t tiles;  // of an output row
  int64_t rows_per_task, blocks_per_image, columns_per_task;
  int64_t rows_at_once, columns_at_once;  // whose products are formed before they go back
};

// One 1x1 convolution by Strassen's algorithm, ready to run. Filled by conv2d_strassen.cpp.
struct StrassenProblem {
  TensorView out, input;
  const float* packed_weight;  // as PackedConv2dWeight packs them: [column block][in channel][kColumnBlock]
  int64_t in_channels, out_channels, column_blocks;
  // Prologue vectors have `in_channels` values or are null; epilogue vectors are padded to whole column blocks.
  const float* input_scale;
  const float* input_shift;
  bool input_relu;
  const float* scale;
  const float* bias;
  TensorView residual;
  bool relu;
  bool in_place;  // the input's own values are read where they lie
  // How the sums are formed, by the shapes alone: see isa/conv2d_strassen.cpp.
  int64_t chunk_half;        // most input channels of a half of a chunk
  int64_t blocks_per_image;  // of pixels, each cut in an upper and a lower half
  // How the work is cut.
  int64_t pixel_blocks_per_task, pairs_per_task;  // pairs of column blocks
  int64_t row_tasks;                              // tasks that the blocks of pixels make

  bool has_prologue() const { return input_scale != nullptr || input_shift != nullptr || input_relu; }
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
constexpr int64_t kLinearFewRowsColumns = 32;  // most weight rows that a task of them has
constexpr int64_t kLinearChunk = 256;          // reduction values per packing task and per pass of the matrix product

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
  const float* centre;  // `columns` values, or null; only beside the other two
  float factor;
  bool relu;
  int64_t rows_per_task;
};

// Functions of one value (x) or two (x, z). alpha and beta are a map's own settings.
enum class Map : int32_t {
  add,       // x + alpha z
  subtract,  // x - alpha z
  multiply,
  divide,
  maximum,
  minimum,
  negate,  // the first function of one value
  absolute,
  square,
  sqrt,
  rsqrt,
  reciprocal,
  exp,
  tanh,
  sigmoid,
  silu,         // x sigmoid(x)
  hardsigmoid,  // clamp(x + 3, 0, 6) / 6
  hardswish,    // x hardsigmoid(x)
  gelu,         // x Phi(x)
  gelu_tanh,    // its approximation by tanh
  mish,         // x tanh(log(1 + exp(x)))
  clamp,        // to alpha ... beta; ReLU6 is clamp to 0 ... 6
  leaky_relu,   // x, or alpha x below 0
  elu           // beta x, or alpha (exp(x) - 1) below 0
};

// Rows of one element-wise pass, ready to run. Filled by strided.cpp.
struct MapProblem {
  Map map;
  DType dtype;
  float alpha, beta;
  void* out;
  const void* a;
  const void* b;  // null for functions of one value
  int64_t rows, columns;
  int64_t out_row, a_row, b_row, out_column, a_column, b_column;  // strides
};

enum class RowsKind : int32_t { layer_norm, softmax };

// One layer normalisation or softmax, ready to run. Filled by rows.cpp.
struct RowsProblem {
  RowsKind kind;
  DType dtype;
  void* out;
  const void* input;
  int64_t out_stride, input_stride;  // from one row to the next
  int64_t rows, columns;
  // RowsKind::layer_norm only.
  const float* weight;
  const float* bias;
  float eps;
  int64_t rows_per_task;
};

// Short weights of a fully connected layer: see isa/linear_short.h.
constexpr int kLinearShortRows = 4;                                  // weight rows that are stored together
constexpr int kLinearShortLanes = 16, kLinearShortBlockBytes = 224;  // of fp32 weights
// How the bits of short fp32 weights lie, by what an instruction set decodes in few instructions.
enum class ShortFormat : int32_t {
  none,   // it decodes none
  bytes,  // isa/short_floats.h: 28 bits as three bytes and a half, vectors of 16
  words   // isa/short_words.h: eight values in seven words, vectors of 8
};
constexpr int kLinearShortBf16Lanes = 32, kLinearShortBf16BlockBytes = 192;

// A weight that its place in a block cannot say.
struct LinearException {
  uint32_t block;
  uint16_t row, lane;
  uint32_t bits;
};

// One fully connected layer with few rows and short weights, ready to run. Filled by linear_short.cpp.
struct LinearShortProblem {
  void* out;
  const void* input;
  int64_t out_stride, input_stride;  // from one row to the next
  int64_t rows, columns, depth;      // M, K, C
  const float* bias;
  bool relu;
  uint32_t first_exponent;
  const uint8_t* blocks;            // [group][block]
  const uint32_t* first_exception;  // of each group, and behind the last
  const LinearException* exceptions;
  int64_t groups_per_task;
};

// One fully connected layer with one row and short weights by input value: see isa/linear_by_input.cpp.
// Vectors of output columns that are stored together, and a vector's lanes.
constexpr int linear_unit_vectors(ShortFormat format) {
  return format == ShortFormat::words ? 8 : 2;
}
constexpr int linear_vector_lanes(ShortFormat format) {
  return format == ShortFormat::words ? 8 : 16;
}
constexpr int linear_unit_columns(ShortFormat format) {
  return linear_unit_vectors(format) * linear_vector_lanes(format);
}
constexpr int linear_unit_bytes(ShortFormat format) {
  return linear_unit_columns(format) * 7 / 2;
}
// The order of isa/linear.cpp's 16 partial sums, one for each lane, in which their tree is climbed with few of them
// kept. Of 8 sums: half of the first 8 numbers.
constexpr int kLinearLaneOrder[] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

struct LinearByInputProblem {
  float* out;
  const float* input;
  int64_t columns, depth;  // K, C
  const float* bias;
  bool relu;
  uint32_t first_exponent;
  const uint8_t* blocks;            // [block of columns][position of an input value][unit of columns]
  const uint32_t* first_exception;  // of each block, and behind the last
  const LinearException* exceptions;
  int64_t block_columns, parts;  // columns of a block (the last has fewer); tasks that share one
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
  bool permutes;     // whether vectors can be permuted by one instruction: isa/conv2d_narrow.h
  // Bytes of scratch one thread needs for a problem.
  int64_t (*conv2d_scratch_bytes)(const Conv2dProblem&);
  // Runs task `index` of the problem with this thread's scratch (64-byte aligned).
  void (*conv2d_task)(const Conv2dProblem&, int64_t index, void* scratch);
  int64_t (*conv2d_grouped_scratch_bytes)(const Conv2dProblem&);
  void (*conv2d_grouped_task)(const Conv2dProblem&, int64_t index, void* scratch);
  int64_t (*winograd_scratch_bytes)(const WinogradProblem&);
  void (*winograd_task)(const WinogradProblem&, int64_t index, void* scratch);
  int64_t (*winograd_plain_scratch_bytes)(const WinogradProblem&);
  void (*winograd_plain_task)(const WinogradProblem&, int64_t index, void* scratch);
  int64_t (*winograd_grouped_scratch_bytes)(const WinogradProblem&);
  void (*winograd_grouped_task)(const WinogradProblem&, int64_t index, void* scratch);
  int64_t (*winograd_rows_scratch_bytes)(const WinogradRowsProblem&);
  void (*winograd_rows_task)(const WinogradRowsProblem&, int64_t index, void* scratch);
  int64_t (*strassen_scratch_bytes)(const StrassenProblem&);
  void (*strassen_task)(const StrassenProblem&, int64_t index, void* scratch);
  void (*pool2d_task)(const Pool2dProblem&, int64_t index);
  int64_t (*local_response_norm_scratch_bytes)(const LocalResponseNormProblem&);
  void (*local_response_norm_task)(const LocalResponseNormProblem&, int64_t index, void* scratch);
  int64_t (*linear_scratch_bytes)(const LinearProblem&);
  // For many rows: packed has room for [panel][c][column_block].
  void (*linear_pack_task)(const LinearProblem&, float* packed, int64_t index);
  void (*linear_few_rows_task)(const LinearProblem&, int64_t index);
  void (*linear_many_rows_task)(const LinearProblem&, const float* packed, int64_t index, void* scratch);
  // Of fp32; null where short floats are none.
  void (*linear_short_task)(const LinearShortProblem&, int64_t index);
  int64_t (*linear_by_input_scratch_bytes)(const LinearByInputProblem&);
  void (*linear_by_input_task)(const LinearByInputProblem&, int64_t index, void* scratch);
  void (*channel_affine_task)(const ChannelAffineProblem&, int64_t index);
  void (*map_block)(const MapProblem&);
  void (*rows_task)(const RowsProblem&, int64_t index);
  void (*batch_statistics_task)(const BatchStatisticsProblem&, int64_t index);
  // Loops that reach the machine's limits: see isa/machine_limits.cpp. The first two return the operations done.
  double (*fma_loop)(int64_t iterations, float* mean);
  double (*bf16_dot_loop)(int64_t iterations, float* mean);  // 0 where the processor has no such instruction
  float (*read_loop)(const float* data, int64_t count);
  const Bf16Kernels* bf16;  // conv2d_bf16.h; null where the processor has no bf16 dot products
  ShortFormat short_format;
  MachineCosts costs;
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
