// From global memory to swizzled tiles of shared memory: im2col rows (A) and filters (B), both with k contiguous.
//
// A thread owns one 16-byte chunk column of both tiles and every (threads / chunks)-th row, so it decodes its filter
// tap once per tile of k and holds one PixelOrigin per row it serves.
#pragma once

#include "../conv2d_problem.h"
#include "conv_index.h"
#include "numeric.cuh"
#include "ptx.cuh"
#include "tile_layout.h"

namespace fastcnn::cuda {

template <typename T, int kTileRows, int kTileColumns, int kRowBytes, int kThreads>
struct ConvLoader {
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kWidth = kVector<T>;             // values in a chunk
  static constexpr int kDepth = kRowBytes / sizeof(T);  // values of k in a tile
  static constexpr int kRowStep = kThreads / kChunks;
  static constexpr int kPassesA = kTileRows / kRowStep;
  static constexpr int kPassesB = kTileColumns / kRowStep;
  static constexpr int kBytesA = kTileRows * kRowBytes;
  static constexpr int kBytesB = kTileColumns * kRowBytes;
  static_assert(kTileRows % kRowStep == 0 && kTileColumns % kRowStep == 0, "whole passes");
  static_assert(kRowStep % 8 == 0, "the swizzle must not depend on the pass");

  const ConvProblem& problem;
  const T* input;   // the group's first channel
  const T* filter;  // this thread's first filter row
  int chunk, filters_left;
  uint32_t tile_start;  // this thread's place in a tile
  PixelOrigin origin[kPassesA];

  __device__ __forceinline__ ConvLoader(const ConvProblem& p, int group, int first_row, int first_column, int thread)
      : problem(p), chunk(thread % kChunks) {
    const int row = thread / kChunks;
    tile_start = tile_offset<kRowBytes>(row, chunk);
    input = static_cast<const T*>(p.input) + static_cast<int64_t>(group) * p.shape.channels;
    filter = static_cast<const T*>(p.weight) +
             (static_cast<int64_t>(group) * p.shape.filters + first_column + row) * p.weight_row_stride;
    filters_left = p.shape.filters - first_column - row;
#pragma unroll
    for (int pass = 0; pass < kPassesA; ++pass) {
      origin[pass] = pixel_origin(p.shape, first_row + row + pass * kRowStep);
    }
  }

  // Issue the copies of k-tile `tile` to shared addresses tile_a, tile_b. The caller commits the group.
  __device__ __forceinline__ void copy_async(int tile, uint32_t tile_a, uint32_t tile_b) const {
    copy_async_a(tile, tile_a);
    copy_async_b(tile, tile_b);
  }
  __device__ __forceinline__ void copy_async_a(int tile, uint32_t tile_a) const {
    const int k = tile * kDepth + chunk * kWidth;
    const FilterTap tap = filter_tap(problem.shape, k);
#pragma unroll
    for (int pass = 0; pass < kPassesA; ++pass) {
      const bool real = inside_image(problem.shape, origin[pass], tap);
      const int64_t offset = real ? origin[pass].offset + tap.offset : 0;
      copy_async_16(tile_a + tile_start + pass * kRowStep * kRowBytes, input + offset, real);
    }
  }
  __device__ __forceinline__ void copy_async_b(int tile, uint32_t tile_b) const {
    const int k = tile * kDepth + chunk * kWidth;
#pragma unroll
    for (int pass = 0; pass < kPassesB; ++pass) {
      const bool real = k < problem.shape.reduction && pass * kRowStep < filters_left;
      const T* from =
          real ? filter + pass * kRowStep * problem.weight_row_stride + k : static_cast<const T*>(problem.weight);
      copy_async_16(tile_b + tile_start + pass * kRowStep * kRowBytes, from, real);
    }
  }
};

// A tile in flight through registers. valid: one bit per value of A (vectors: per pass) that is real, not padding.
template <typename Loader>
struct StagedTile {
  uint4 a[Loader::kPassesA];
  uint4 b[Loader::kPassesB];
  uint32_t valid;
};

template <typename T, typename Loader>
__device__ __forceinline__ void load_vectors_a(const Loader& loader, int tile, StagedTile<Loader>& staged) {
  const ConvShape& shape = loader.problem.shape;
  const int k = tile * Loader::kDepth + loader.chunk * Loader::kWidth;
  const FilterTap tap = filter_tap(shape, k);
  const uint4 zero = make_uint4(0, 0, 0, 0);
  staged.valid = 0;
#pragma unroll
  for (int pass = 0; pass < Loader::kPassesA; ++pass) {
    const bool real = inside_image(shape, loader.origin[pass], tap);
    staged.a[pass] = zero;
    if (real) {
      staged.a[pass] = load_16(loader.input + loader.origin[pass].offset + tap.offset);
      staged.valid |= 1u << pass;
    }
  }
}

template <typename T, typename Loader>
__device__ __forceinline__ void load_vectors_b(const Loader& loader, int tile, StagedTile<Loader>& staged) {
  const ConvShape& shape = loader.problem.shape;
  const int k = tile * Loader::kDepth + loader.chunk * Loader::kWidth;
  const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int pass = 0; pass < Loader::kPassesB; ++pass) {
    staged.b[pass] = zero;
    if (k < shape.reduction && pass * Loader::kRowStep < loader.filters_left) {
      staged.b[pass] = load_16(loader.filter + pass * Loader::kRowStep * loader.problem.weight_row_stride + k);
    }
  }
}

template <typename T, typename Loader>
__device__ __forceinline__ void load_elements(const Loader& loader, int tile, StagedTile<Loader>& staged) {
  constexpr int kWidth = Loader::kWidth;
  static_assert(Loader::kPassesA * kWidth <= 32, "one validity bit per element");
  const ConvShape& shape = loader.problem.shape;
  const int k = tile * Loader::kDepth + loader.chunk * kWidth;
  T a[Loader::kPassesA][kWidth];
  T b[Loader::kPassesB][kWidth];
  staged.valid = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const FilterTap tap = filter_tap(shape, k + i);
#pragma unroll
    for (int pass = 0; pass < Loader::kPassesA; ++pass) {
      const bool real = inside_image(shape, loader.origin[pass], tap);
      a[pass][i] = from_float<T>(0.0f);
      if (real) {
        a[pass][i] = loader.input[loader.origin[pass].offset + tap.offset];
        staged.valid |= 1u << (pass * kWidth + i);
      }
    }
#pragma unroll
    for (int pass = 0; pass < Loader::kPassesB; ++pass) {
      b[pass][i] = from_float<T>(0.0f);
      if (k + i < shape.reduction && pass * Loader::kRowStep < loader.filters_left) {
        b[pass][i] = loader.filter[pass * Loader::kRowStep * loader.problem.weight_row_stride + k + i];
      }
    }
  }
  memcpy(staged.a, a, sizeof(a));
  memcpy(staged.b, b, sizeof(b));
}

// Applies the prologue to the real values of A; padding stays zero. The result is rounded to T, as the unfused
// batch norm would have been.
template <typename T, bool kVectors, typename Loader>
__device__ __forceinline__ void apply_prologue(const Loader& loader, int group, int tile, StagedTile<Loader>& staged) {
  constexpr int kWidth = Loader::kWidth;
  const ConvProblem& problem = loader.problem;
  const int k = tile * Loader::kDepth + loader.chunk * kWidth;
  const int64_t first = static_cast<int64_t>(group) * problem.shape.channels;
  int channel = filter_tap(problem.shape, k).channel;
  float scale[kWidth], shift[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const bool real = k + i < problem.shape.reduction;
    scale[i] = real && problem.input_scale != nullptr ? __ldg(problem.input_scale + first + channel) : 1.0f;
    shift[i] = real && problem.input_shift != nullptr ? __ldg(problem.input_shift + first + channel) : 0.0f;
    // A chunk of vectors lies in one tap; single elements may run over into the next.
    channel = !kVectors && channel + 1 == problem.shape.channels ? 0 : channel + 1;
  }
#pragma unroll
  for (int pass = 0; pass < Loader::kPassesA; ++pass) {
    T values[kWidth];
    memcpy(values, &staged.a[pass], 16);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const bool real = (staged.valid >> (kVectors ? pass : pass * kWidth + i)) & 1u;
      const float x = to_float(values[i]) * scale[i] + shift[i];
      values[i] = from_float<T>(real ? (problem.input_relu ? relu(x) : x) : 0.0f);
    }
    memcpy(&staged.a[pass], values, 16);
  }
}

template <typename Loader>
__device__ __forceinline__ void store_staged_a(const Loader& loader, const StagedTile<Loader>& staged,
                                               uint32_t tile_a) {
#pragma unroll
  for (int pass = 0; pass < Loader::kPassesA; ++pass) {
    store_shared_16(tile_a + loader.tile_start + pass * Loader::kRowStep * Loader::kChunks * 16, staged.a[pass]);
  }
}

template <typename Loader>
__device__ __forceinline__ void store_staged_b(const Loader& loader, const StagedTile<Loader>& staged,
                                               uint32_t tile_b) {
#pragma unroll
  for (int pass = 0; pass < Loader::kPassesB; ++pass) {
    store_shared_16(tile_b + loader.tile_start + pass * Loader::kRowStep * Loader::kChunks * 16, staged.b[pass]);
  }
}

}  // namespace fastcnn::cuda
