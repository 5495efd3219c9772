// What every convolution kernel receives, and the launchers that conv2d.cu chooses from.
#pragma once

#include <cstdint>

#include "../common/types.h"
#include "device/conv_index.h"

namespace fastcnn::cuda {

// Passed by value as the kernel's only parameter. Strides are in elements; vectors index the whole layer, a group's
// part starts at group * channels (input side) or group * filters (output side).
struct ConvProblem {
  ConvShape shape;
  const void* input = nullptr;
  const void* weight = nullptr;  // groups * filters rows of `reduction` values
  int64_t weight_row_stride = 0;
  const float* input_scale = nullptr;
  const float* input_shift = nullptr;
  bool input_relu = false;
  bool relu = false;
  bool vector_output = false;  // 16-byte accesses to out and residual are aligned
  const float* scale = nullptr;
  const float* bias = nullptr;
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  void* out = nullptr;
  int64_t out_stride = 0;
  int32_t groups = 1;
  FastDivisor by_column_tiles;  // tiles along the filters; set by the launcher

  bool has_prologue() const { return input_scale != nullptr || input_shift != nullptr || input_relu; }
};

// How a kernel fetches its operands.
enum class LoadPath {
  async_vectors,    // cp.async, 16 bytes: aligned, no prologue
  staged_vectors,   // 16 bytes through registers: aligned, prologue applied on the way
  staged_elements,  // single elements through registers: any channel count, any alignment, prologue if present
};

struct LaunchTarget {
  int device;
  void* stream;
};

// mma.sync tensor-core kernels (bf16, fp16, and fp32 as tf32). Tile sizes served: see conv2d_mma.cuh.
template <typename T>
void launch_conv2d_mma(const ConvProblem& problem, LoadPath path, int tile_rows, int tile_columns,
                       const LaunchTarget& target);

// wgmma tensor-core kernels (sm_90a; bf16, fp16; vectors only; groups = 1). tile_columns is 64, 128, or without a
// prologue 256.
template <typename T>
void launch_conv2d_wgmma(const ConvProblem& problem, LoadPath path, int tile_columns, const LaunchTarget& target);

// wgmma fed by bulk copies (sm_90a; bf16, fp16), for every problem that tma_fits. Tiles served, as rows x columns:
// together 256x128, 256x64, 128x128, 128x64, 128x32; in turns 128x128, 128x64, 128x32; with a prologue 128x128, 128x64.
// With groups, a group's filters must be whole columns; 32 columns serve up to 32 filters only. `block` is 64, or
// without groups and a prologue 32 or 96 (together 256x128; in turns 128x128, 128x64): channels that a stage takes from
// one tap.
bool tma_fits(const ConvProblem& problem, DType dtype);
template <typename T>
void launch_conv2d_tma(const ConvProblem& problem, int tile_rows, int tile_columns, bool in_turns, int block,
                       const LaunchTarget& target);

// The same with each tile's reduction split over a cluster of `split` = 2, 4 or 8 blocks, at most one for each 64
// channels of a tap: for grids that leave most of the device idle. Tiles of 128x128, or 128x64 with or without a
// prologue.
template <typename T>
void launch_conv2d_tma_split(const ConvProblem& problem, int tile_columns, int split, const LaunchTarget& target);

// Few input channels, mma.sync or wgmma (bf16, fp16).
struct DeviceFacts;
bool stem_fits(const ConvProblem& problem, const DeviceFacts& device, bool wgmma);
template <typename T>
void launch_conv2d_stem(const ConvProblem& problem, const LaunchTarget& target);
template <typename T>
void launch_conv2d_stem_wgmma(const ConvProblem& problem, const LaunchTarget& target);

// wgmma on patches of the input that all filter taps share (sm_90a; bf16, fp16). tile_columns is 64, or 32 for up to 32
// filters; see patch_fits (conv2d_patch_plan.h).
template <typename T>
void launch_conv2d_patch(const ConvProblem& problem, int tile_columns, const LaunchTarget& target);

// The same with the filters in registers; see held_patch_fits.
template <typename T>
void launch_conv2d_patch_held(const ConvProblem& problem, const LaunchTarget& target);

// Exact fp32 on CUDA cores.
void launch_conv2d_simt(const ConvProblem& problem, LoadPath path, const LaunchTarget& target);

// Few channels per group, on CUDA cores.
template <typename T>
void launch_conv2d_grouped(const ConvProblem& problem, const LaunchTarget& target);
template <typename T>
bool depthwise_fits(const ConvProblem& problem);
template <typename T>
void launch_conv2d_depthwise(const ConvProblem& problem, const LaunchTarget& target);

}  // namespace fastcnn::cuda
