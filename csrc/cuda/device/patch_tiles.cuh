// The order of tiles and stages in the kernels with patches.
#pragma once

#include "../conv2d_patch_operands.h"
#include "portable.h"
#include "wgmma.cuh"

namespace fastcnn::cuda {

#if defined(FASTCNN_HAS_WGMMA)

struct PatchRing {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A tile's first pixel.
struct PatchOrigin {
  int n, h, w;
  __device__ __forceinline__ PatchOrigin(const PatchConvolution& problem, int tile) {
    int32_t across, down;
    const int32_t rest = problem.by_tiles_w.divide(tile, across);
    n = problem.by_tiles_h.divide(rest, down) * problem.plan.tile_n;
    h = down * problem.plan.tile_h;
    w = across * problem.plan.tile_w;
  }
};

#endif

}  // namespace fastcnn::cuda
