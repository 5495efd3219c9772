// Convolution on tensor cores through mma.sync (sm_80 and later): implicit matrix product.
//
//   out[m, k] = act(sum_j A[m, j] * B[k, j] * scale[k] + bias[k] + residual[m, k])
//   m = output pixel (N*P*Q), k = filter, j = (r*S + s)*C/g + c. A is im2col of pro(input), never built; B the filters.
//
// Work: one block per tile of (rows of m) x (columns of k) and group; neighbouring blocks share their rows, so A is
//   fetched from L2 when K spans several tiles. A warp computes 64x32 or 32x32 as m16n8 products.
// Shared memory: tiles of 64-byte rows (32 values of j in 16-bit types, 16 in fp32), swizzled (tile_layout.h): four
//   stages filled by cp.async, or two filled through registers when a prologue or single elements are in the way.
// Registers: the accumulators, one k-step of fragments, one PixelOrigin per row a thread loads.
// fp32 inputs are rounded to tf32 (nearest) on their way into the fragments.
// Floor: 2*N*P*Q*K*R*S*C/g operations on the tensor cores; input, filters, residual and output once through DRAM.
//
// Tiles: 128x128 (8 warps), 128x64, 128x32 (narrow groups), 64x64 (few pixels, or the only tile for single elements).
#pragma once

#include "conv2d_problem.h"
#include "device/conv_epilogue.cuh"
#include "device/conv_loader.cuh"
#include "host.h"

namespace fastcnn::cuda {

template <typename T, int kRows_, int kColumns_, int kWarpRows_, LoadPath kPath_>
struct MmaTile {
  using Type = T;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kSlabColumns;
  static constexpr LoadPath kPath = kPath_;
  static constexpr int kWarpsDown = kRows / kWarpRows, kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;
  static constexpr int kRowBytes = 64;
  static constexpr int kStages = kPath == LoadPath::async_vectors ? 4 : 2;
  using Loader = ConvLoader<T, kRows, kColumns, kRowBytes, kThreads>;
  static constexpr int kStageBytes = Loader::kBytesA + Loader::kBytesB;
  static constexpr int kSlabsBytes = kThreads / 32 * kSlabBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes > kSlabsBytes ? kStages * kStageBytes : kSlabsBytes;
};

// One stage: two k-steps of 32 bytes.
template <typename Tile>
__device__ __forceinline__ void multiply_stage(float (&acc)[Tile::kWarpRows / 16][4][4], uint32_t tile_a,
                                               uint32_t tile_b, int warp_row, int warp_column, int lane) {
  constexpr int kAtomsM = Tile::kWarpRows / 16;
#pragma unroll
  for (int step = 0; step < Tile::kRowBytes / 32; ++step) {
    uint32_t a[kAtomsM][4], b[2][4];
#pragma unroll
    for (int i = 0; i < kAtomsM; ++i) {
      load_matrix_x4(a[i], tile_a + tile_offset<Tile::kRowBytes>(warp_row + 16 * i + a_lane_row(lane),
                                                                 2 * step + a_lane_chunk(lane)));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      load_matrix_x4(b[j], tile_b + tile_offset<Tile::kRowBytes>(warp_column + 16 * j + b_lane_row(lane),
                                                                 2 * step + b_lane_chunk(lane)));
    }
    if constexpr (sizeof(typename Tile::Type) == 4) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int i = 0; i < kAtomsM; ++i) a[i][e] = round_to_tf32(a[i][e]);
#pragma unroll
        for (int j = 0; j < 2; ++j) b[j][e] = round_to_tf32(b[j][e]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtomsM; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        mma_sync<typename Tile::Type>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) conv2d_mma(const __grid_constant__ ConvProblem problem) {
  using T = typename Tile::Type;
  using Loader = typename Tile::Loader;
  constexpr int kAtomsM = Tile::kWarpRows / 16;

  int32_t column_tile;
  const int32_t row_tile = problem.by_column_tiles.divide(static_cast<int32_t>(blockIdx.x), column_tile);
  const int first_row = row_tile * Tile::kRows;
  const int first_column = column_tile * Tile::kColumns;
  const int group = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warp_row = warp % Tile::kWarpsDown * Tile::kWarpRows;
  const int warp_column = warp / Tile::kWarpsDown * Tile::kWarpColumns;

  unsigned char* shared = dynamic_shared();
  const uint32_t stages = shared_address(shared);
  const Loader loader(problem, group, first_row, first_column, thread);
  const int tiles = (problem.shape.reduction + Loader::kDepth - 1) / Loader::kDepth;

  float acc[kAtomsM][4][4] = {};

  if constexpr (Tile::kPath == LoadPath::async_vectors) {
    constexpr int kAhead = Tile::kStages - 1;
#pragma unroll
    for (int t = 0; t < kAhead; ++t) {
      if (t < tiles)
        loader.copy_async(t, stages + t * Tile::kStageBytes, stages + t * Tile::kStageBytes + Loader::kBytesA);
      copy_async_commit();
    }
    for (int t = 0; t < tiles; ++t) {
      copy_async_wait<kAhead - 1>();  // tile t has arrived for this thread,
      __syncthreads();                // for all threads; and all are done reading the stage filled next
      const int next = t + kAhead;
      if (next < tiles) {
        const uint32_t stage = stages + next % Tile::kStages * Tile::kStageBytes;
        loader.copy_async(next, stage, stage + Loader::kBytesA);
      }
      copy_async_commit();  // an empty group keeps the count of groups equal to the count of tiles
      const uint32_t stage = stages + t % Tile::kStages * Tile::kStageBytes;
      multiply_stage<Tile>(acc, stage, stage + Loader::kBytesA, warp_row, warp_column, lane);
    }
    copy_async_wait<0>();
  } else {
    constexpr bool kVectors = Tile::kPath == LoadPath::staged_vectors;
    const bool prologue = problem.input_scale != nullptr || problem.input_shift != nullptr || problem.input_relu;
    StagedTile<Loader> staged;
    for (int t = -1; t < tiles; ++t) {
      const bool more = t + 1 < tiles;
      if (more) {
        if constexpr (kVectors) {
          load_vectors_a<T>(loader, t + 1, staged);
          load_vectors_b<T>(loader, t + 1, staged);
        } else {
          load_elements<T>(loader, t + 1, staged);
        }
      }
      if (t >= 0) {  // multiply while the next tile is on its way
        const uint32_t stage = stages + t % 2 * Tile::kStageBytes;
        multiply_stage<Tile>(acc, stage, stage + Loader::kBytesA, warp_row, warp_column, lane);
      }
      if (more) {
        if (prologue) apply_prologue<T, kVectors>(loader, group, t + 1, staged);
        const uint32_t stage = stages + (t + 1) % 2 * Tile::kStageBytes;
        store_staged_a(loader, staged, stage);
        store_staged_b(loader, staged, stage + Loader::kBytesA);
      }
      __syncthreads();
    }
  }

  __syncthreads();  // the slabs below reuse the stages
  float* slab = reinterpret_cast<float*>(shared + warp * kSlabBytes);
  const SlabEpilogue<T> epilogue(problem, group, first_column + warp_column, lane);
#pragma unroll
  for (int i = 0; i < kAtomsM; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) accumulator_to_slab(slab, j, acc[i][j], lane);
    __syncwarp();
    epilogue.store_rows(slab, first_row + warp_row + 16 * i);
    __syncwarp();
  }
}

template <typename Tile>
void launch_mma_tile(const char* name, ConvProblem problem, const LaunchTarget& target) {
  const int64_t column_tiles = ceil_divide(problem.shape.filters, Tile::kColumns);
  const int64_t row_tiles = ceil_divide(problem.shape.rows, Tile::kRows);
  problem.by_column_tiles = FastDivisor(column_tiles);
  const dim3 grid(static_cast<unsigned>(column_tiles * row_tiles), static_cast<unsigned>(problem.groups));
  launch<conv2d_mma<Tile>>(name, target.device, grid, Tile::kThreads, Tile::kSharedBytes, target.stream, problem);
}

template <typename T>
void launch_conv2d_mma(const ConvProblem& problem, LoadPath path, int tile_rows, int tile_columns,
                       const LaunchTarget& target) {
  constexpr LoadPath kAsync = LoadPath::async_vectors, kStaged = LoadPath::staged_vectors;
  if (path == LoadPath::staged_elements) {
    launch_mma_tile<MmaTile<T, 64, 64, 32, LoadPath::staged_elements>>("conv2d mma 64x64 elements", problem, target);
  } else if (path == kStaged) {
    if (tile_columns == 32) {
      launch_mma_tile<MmaTile<T, 128, 32, 32, kStaged>>("conv2d mma 128x32 staged", problem, target);
    } else if (tile_rows == 64) {
      launch_mma_tile<MmaTile<T, 64, 64, 32, kStaged>>("conv2d mma 64x64 staged", problem, target);
    } else {
      launch_mma_tile<MmaTile<T, 128, 64, 64, kStaged>>("conv2d mma 128x64 staged", problem, target);
    }
  } else if (tile_columns == 32) {
    launch_mma_tile<MmaTile<T, 128, 32, 32, kAsync>>("conv2d mma 128x32", problem, target);
  } else if (tile_columns == 128) {
    launch_mma_tile<MmaTile<T, 128, 128, 64, kAsync>>("conv2d mma 128x128", problem, target);
  } else if (tile_rows == 64) {
    launch_mma_tile<MmaTile<T, 64, 64, 32, kAsync>>("conv2d mma 64x64", problem, target);
  } else {
    launch_mma_tile<MmaTile<T, 128, 64, 64, kAsync>>("conv2d mma 128x64", problem, target);
  }
}

}  // namespace fastcnn::cuda
