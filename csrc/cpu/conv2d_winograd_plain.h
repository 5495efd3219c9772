// Winograd convolution F(4x4, 3x3) with weights that stay plain in memory: see isa/conv2d_winograd_plain.cpp.
#pragma once

#include <cstdint>
#include <memory>

#include "../common/types.h"
#include "work.h"

namespace fastcnn::cpu {

// 3x3 weights for that kernel. Groups must consist of whole vectors of channels, in and out, or be equal parts of a
// vector of 4 channels and more, as many out as in: those are served by isa/conv2d_winograd_grouped.cpp.
class PlainWinogradWeight {
 public:
  static bool spans_groups(int64_t out_channels, int64_t in_channels, int64_t groups);
  static bool covers(int64_t out_channels, int64_t in_channels, int64_t groups);

  // weight: (K, C/groups, 3, 3) with the given element strides, fp32 or bf16.
  PlainWinogradWeight(const void* weight, DType dtype, const int64_t shape[4], const int64_t strides[4],
                      int64_t groups);
  // The same with the values of an earlier packing for this instruction set: `packed` holds bytes() bytes.
  PlainWinogradWeight(int64_t out_channels, int64_t in_channels, int64_t groups);
  void assign(const void* packed);

  int64_t out_channels, in_channels, groups;
  int64_t out_vectors, in_vectors;  // of channels, over all groups
  int64_t depth;                    // input channels that a vector of outputs meets, padded
  bool half_transformed;            // see isa/conv2d_winograd_half.h
  const float* data() const { return data_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  void put(int64_t k, int64_t c, const float (&taps)[3][3]);

  std::unique_ptr<float, void (*)(void*)> data_;
  int64_t bytes_;
};

Works conv2d_winograd_plain_work(const TensorView& out, const TensorView& input, const PlainWinogradWeight& weight,
                                 const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry,
                                 int threads, bool max_pool = false);

// Estimated cycles on two threads, as conv2d_cycles() gives them for the others. Sizes are those of the output.
double conv2d_winograd_plain_cycles(int64_t n, int64_t out_channels, int64_t p, int64_t q, int64_t in_channels,
                                    int64_t groups);

}  // namespace fastcnn::cpu
