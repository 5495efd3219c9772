// How a stem convolution is cut up; conv2d_stem_plan.cu decides.
#pragma once

#include "conv2d_problem.h"
#include "device/stem_layout.h"
#include "device/stem_pool_layout.h"

namespace fastcnn::cuda {

constexpr int kStemChunk = 32;  // output pixels that a warp multiplies at a time: two products of 16 rows
constexpr int kStemBlocks = 2;  // per multiprocessor

// 96 filters take more than 128 registers a thread.
constexpr int stem_most_warps(int columns) {
  return columns == 96 ? 4 : 8;
}

// With wgmma: warpgroups of four warps, two in a block, take 64 pixels at a time.
constexpr int kStemWgmmaChunk = 64;
constexpr int kStemWgmmaWarps = 8;

// False: not a case for the stem kernels.
bool make_stem_plan(StemPlan& plan, const ConvProblem& problem, const DeviceFacts& device, bool wgmma);

// The same with a max pooling, whose output and padding `plan` says already.
bool make_stem_pool_plan(StemPoolPlan& plan, const ConvProblem& problem, const DeviceFacts& device);

template <typename T>
void launch_conv2d_stem_pool(const ConvProblem& problem, const StemPoolPlan& plan, const LaunchTarget& target);

}  // namespace fastcnn::cuda
