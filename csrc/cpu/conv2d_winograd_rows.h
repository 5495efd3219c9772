// Winograd convolution along rows: see isa/conv2d_winograd_rows.cpp.
#pragma once

#include <cstdint>
#include <memory>

#include "../common/types.h"
#include "work.h"

namespace fastcnn::cpu {

// Square filters, transformed along their rows for that kernel.
class RowWinogradWeight {
 public:
  // Filters of 2 to 4 taps a phase with strides 2 to 4, or of 5 taps with stride 1.
  static bool covers(int64_t filter, int stride);

  // weight: (K, C, R, R) with the given element strides, fp32 or bf16.
  RowWinogradWeight(const void* weight, DType dtype, const int64_t shape[4], const int64_t strides[4], int stride);
  // The same with the values of an earlier packing for this instruction set: `packed` holds bytes() bytes.
  RowWinogradWeight(int64_t out_channels, int64_t in_channels, int filter, int stride);
  void assign(const void* packed);

  int64_t out_channels, in_channels;
  int filter, stride;  // of a side
  int taps, side;      // of a phase with all its taps; points to a tile
  // Of a filter row's reduction, those at the point infinity (where phases with a tap less have nothing), and all.
  int64_t words, last_words, all_words;
  int64_t column_blocks;
  const float* data() const { return data_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<float, void (*)(void*)> data_;
  int64_t bytes_;
};

// max_pool: `out` holds the maximum of each 2x2 window of the convolution's output; stride 1 only, and no residual.
Works conv2d_winograd_rows_work(const TensorView& out, const TensorView& input, const RowWinogradWeight& weight,
                                const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry,
                                int threads, bool max_pool = false);

// Estimated cycles on two threads, as conv2d_cycles() gives them for the others. Sizes are those of the output.
double conv2d_winograd_rows_cycles(int64_t n, int64_t out_channels, int64_t p, int64_t q, int64_t in_channels,
                                   int filter, int stride);

}  // namespace fastcnn::cpu
