// Which convolution kernel serves a case: the rule, and every kernel that could.
#pragma once

#include <string>
#include <vector>

#include "conv2d_problem.h"
#include "host.h"

namespace fastcnn::cuda {

enum class Kernel { depthwise, grouped, simt, stem, stem_wgmma, tma, patch, patch_held, wgmma, mma };

struct Choice {
  Kernel kernel;
  LoadPath path = LoadPath::async_vectors;
  int tile_rows = 0, tile_columns = 0;
  bool in_turns = false;  // tma: a tile belongs to one warpgroup
  int split = 1;          // tma: blocks that share a tile's reduction
  int block = 64;         // tma: channels that a stage takes from one tap
};

// "wgmma 128x256", "mma 64x64 elements", "tma 128x64 in turns", "tma 128x64 split 4": unique among the kernels that can
// serve one case.
std::string name_of(const Choice& choice);

// The kernel that the rule chooses.
Choice choose(const ConvProblem& problem, DType dtype, bool allow_tf32, const DeviceFacts& device);

// Every kernel that serves the problem, the rule's choice first.
std::vector<Choice> choices(const ConvProblem& problem, DType dtype, bool allow_tf32, const DeviceFacts& device);

// Launches the rule's choice. Rows must be below kRowLimit.
void launch_conv2d(const ConvProblem& problem, DType dtype, bool allow_tf32, const LaunchTarget& target);

}  // namespace fastcnn::cuda
