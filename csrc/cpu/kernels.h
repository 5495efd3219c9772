// The CPU backend's entry points, called by bindings.cpp. Arguments are already checked; pointers are host memory.
// `threads` is the caller's torch.get_num_threads().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../common/types.h"
#include "conv2d_winograd_phases.h"
#include "work.h"
#include "workspace.h"

namespace fastcnn::cpu {

// Weights of a convolution rearranged for the micro-kernel of one instruction set (layouts: isa/conv2d.cpp,
// isa/conv2d_grouped.cpp, and the same with _bf16).
class PackedConv2dWeight {
 public:
  // weight: (K, C/groups, R, S) with the given element strides, any of the three dtypes.
  PackedConv2dWeight(const void* weight, DType dtype, const int64_t shape[4], const int64_t strides[4], int64_t groups);
  // The same with the values of an earlier packing for this instruction set: `packed` holds bytes() bytes. dtype: of
  // the weight that was packed.
  PackedConv2dWeight(DType dtype, const int64_t shape[4], int64_t groups);
  void assign(const void* packed);

  int64_t out_channels, in_channels;  // K and C, over all groups
  int64_t filter_h, filter_w, groups;
  int64_t group_in, group_out;  // channels of one group
  // Narrow groups, as wide out as in: packed for isa/conv2d_grouped.cpp by vectors that span several groups.
  bool spans_groups;
  // Of a bf16 weight, where the processor has bf16 dot products: packed in pairs for isa/conv2d_bf16.cpp or, where
  // spans_groups, isa/conv2d_grouped_bf16.cpp, which take bf16 tensors only.
  bool bf16_pairs;
  int64_t column_blocks;  // blocks of output channels in a group, or vectors of channels over all where spans_groups
  const float* data() const { return data_.get(); }
  const uint16_t* pairs() const { return reinterpret_cast<const uint16_t*>(data_.get()); }
  int64_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<float, void (*)(void*)> data_;
  int64_t bytes_;
};

void conv2d(const TensorView& out, const TensorView& input, const PackedConv2dWeight& weight, const Prologue& prologue,
            const Epilogue& epilogue, const Conv2dGeometry& geometry, int threads);

// conv2d() for a 1x1 filter with stride 1 and one group, without padding, of fp32 tensors and an even number of input
// channels, by Strassen's algorithm.
void conv2d_strassen(const TensorView& out, const TensorView& input, const PackedConv2dWeight& weight,
                     const Prologue& prologue, const Epilogue& epilogue, int threads);

// Square filters transformed for Winograd convolution in tiles of tile x tile outputs (layouts: isa/conv2d_winograd.cpp
// and isa/conv2d_winograd_bf16.cpp).
class PackedConv2dWinogradWeight {
 public:
  // weight: (K, C, R, R) with the given element strides, fp32 or bf16. winograd_has(tile, ceil(R / stride)).
  PackedConv2dWinogradWeight(const void* weight, DType dtype, const int64_t shape[4], const int64_t strides[4],
                             int tile, int stride);
  // The same with the values of an earlier packing for this instruction set: `packed` holds bytes() bytes. dtype: of
  // the weight that was packed.
  PackedConv2dWinogradWeight(DType dtype, int64_t out_channels, int64_t in_channels, int filter, int tile, int stride);
  void assign(const void* packed);

  int64_t out_channels, in_channels;
  int filter, stride, tile;  // of a side: taps, outputs
  // Of a bf16 3x3 weight in tiles of 2x2, where the processor has bf16 dot products: packed in pairs, which take bf16
  // tensors only.
  bool bf16_pairs;
  WinogradPhases phases;
  int64_t column_blocks;
  int side() const { return tile + phases.taps() - 1; }  // of a tile's points, and its input in one phase
  // Whether tiles of a picture of that size hold whole 2x2 windows, so that their maxima may be formed on the way back.
  bool may_pool(int64_t height, int64_t width) const;
  const std::vector<int64_t>& point_words() const { return point_words_; }  // before each point, and all
  const float* data() const { return data_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  std::vector<int64_t> point_words_;
  std::unique_ptr<float, void (*)(void*)> data_;
  int64_t bytes_;
};

// conv2d() for square filters, dilation 1, one group, by Winograd's algorithm. The geometry's stride is the weight's.
void conv2d_winograd(const TensorView& out, const TensorView& input, const PackedConv2dWinogradWeight& weight,
                     const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry, int threads);

// Pooling; what each computes, and the windows: isa/pool2d.cpp. Output sizes come with `out`.
void max_pool2d(const TensorView& out, const TensorView& input, const Pool2dGeometry& geometry, int threads);
void avg_pool2d(const TensorView& out, const TensorView& input, const Pool2dGeometry& geometry, int64_t pad_bottom,
                int64_t pad_right, bool count_include_pad, int64_t divisor,
                int threads);  // divisor 0: the window's size
void adaptive_avg_pool2d(const TensorView& out, const TensorView& input, int threads);

void local_response_norm(const TensorView& out, const TensorView& input, int64_t size, float alpha, float beta, float k,
                         int threads);

// out = act(input @ weight.T + bias). A matrix is a view with n rows, h = w = 1, c columns and pixel_stride as its row
// stride: out (M, K), input (M, C), weight (K, C).
void linear(const TensorView& out, const TensorView& input, const TensorView& weight, const float* bias,
            Activation activation, int threads);

// out = act((input - centre[c]) * scale[c] + shift[c] + residual), with vectors or null; without all three,
// act(input * factor + residual). residual may be an empty view. out may be exactly input or residual.
void channel_affine(const TensorView& out, const TensorView& input, const float* scale, const float* shift,
                    const float* centre, const TensorView& residual, Activation activation, float factor, int threads);

// Per-channel mean and biased variance over N, H, W. The same bits for every number of threads. Sums of fp32 values in
// fp32 and float64, so that the mean has more digits than fp32 holds.
void batch_statistics(double* mean, double* var, const TensorView& input, int threads);

// channel_affine's vectors for batch norm with these statistics: y = (x - centre) * scale + shift. weight and bias may
// be null. What a centre of fp32 leaves of the mean goes into the shift.
void batch_norm_vectors(float* centre, float* scale, float* shift, const double* mean, const double* var,
                        const float* weight, const float* bias, double eps, int64_t channels);

// The same operators prepared but not run (work.h). Tensors, weights and vectors must outlive the works.
// max_pool: `out` is the maximum of each 2x2 window of what is convolved; rows and columns that make no whole window
// are not computed. Then there may be no residual, and conv2d_may_pool() must say so.
Works conv2d_work(const TensorView& out, const TensorView& input, const PackedConv2dWeight& weight,
                  const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry, int threads,
                  bool max_pool = false);
// `out` is what would be left after pooling; its and the input's data are not looked at.
bool conv2d_may_pool(const TensorView& out, const TensorView& input, const PackedConv2dWeight& weight,
                     const Conv2dGeometry& geometry);
Works conv2d_strassen_work(const TensorView& out, const TensorView& input, const PackedConv2dWeight& weight,
                           const Prologue& prologue, const Epilogue& epilogue, int threads);
// max_pool: as above, for any shape.
Works conv2d_winograd_work(const TensorView& out, const TensorView& input, const PackedConv2dWinogradWeight& weight,
                           const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry,
                           int threads, bool max_pool = false);
Works max_pool2d_work(const TensorView& out, const TensorView& input, const Pool2dGeometry& geometry, int threads);
Works avg_pool2d_work(const TensorView& out, const TensorView& input, const Pool2dGeometry& geometry,
                      int64_t pad_bottom, int64_t pad_right, bool count_include_pad, int64_t divisor, int threads);
Works adaptive_avg_pool2d_work(const TensorView& out, const TensorView& input, int threads);
Works local_response_norm_work(const TensorView& out, const TensorView& input, int64_t size, float alpha, float beta,
                               float k, int threads);
// Bytes of workspace that the works of a layer with so many rows and input features use, whatever the threads.
int64_t linear_workspace_bytes(int64_t rows, int64_t depth);
// `workspace` is reserved here and used by the works.
Works linear_work(const TensorView& out, const TensorView& input, const TensorView& weight, const float* bias,
                  Activation activation, int threads, const std::shared_ptr<Workspace>& workspace);
Works channel_affine_work(const TensorView& out, const TensorView& input, const float* scale, const float* shift,
                          const float* centre, const TensorView& residual, Activation activation, float factor,
                          int threads);

// The instruction set in use: "avx512_bf16", "avx512", "avx2" or "portable". Chosen once from what the processor has;
// the environment variable FASTCNN_CPU_ISA asks for a lower one.
std::string instruction_set();
std::vector<std::string> instruction_sets();  // those that this build holds and this processor can run, best first

}  // namespace fastcnn::cpu
