// Convolution on Hopper's tensor cores through wgmma (sm_90a), for bf16 and fp16, aligned channels, groups = 1.
//
//   out[m, k] = act(sum_j A[m, j] * B[k, j] * scale[k] + bias[k] + residual[m, k])       as in conv2d_mma.cuh
//
// Work: one block of two warpgroups per 128 rows of m by 64, 128 or 256 filters; a warpgroup multiplies 64 rows. 1x1
// and
//   RxS filters alike: the gather happens in the copies.
// Shared memory: stages of 128-byte rows (64 values of j) in the 128B swizzle that wgmma reads in place, filled by
//   cp.async, which unlike a bulk tensor copy may gather any strided, padded, dilated window and needs no descriptor
//   from the driver.
// Registers: accumulators only; operands go from shared memory to the tensor cores.
// Order: before the barrier of tile t each thread has waited for its copies of tile t and made them visible to the
//   async proxy, and each warpgroup has waited for its product of tile t-1; after it, tile t may be multiplied and the
//   stage of tile t-1 refilled. The copies of the next tiles are issued while the tensor cores work on tile t; two
//   blocks share a multiprocessor, so one multiplies while the other waits at its barrier.
// With a prologue, A passes through registers into one of two stages while the tensor cores work on the other; B still
//   comes by cp.async.
// Floor: as in conv2d_mma.cuh.
#include "conv2d_problem.h"
#include "device/conv_epilogue.cuh"
#include "device/conv_loader.cuh"
#include "device/wgmma.cuh"
#include "host.h"

namespace fastcnn::cuda {

template <typename T, int kColumns_, LoadPath kPath_, int kStages_>
struct WgmmaTile {
  using Type = T;
  static constexpr LoadPath kPath = kPath_;
  static constexpr int kRows = 128, kColumns = kColumns_, kStages = kStages_;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerMultiprocessor = kColumns == 256 ? 1 : 2;
  static constexpr int kRowBytes = 128;
  static constexpr int kPieceColumns = kColumns < 128 ? kColumns : 128;  // columns of one wgmma
  static constexpr int kPieces = kColumns / kPieceColumns;
  using Loader = ConvLoader<T, kRows, kColumns, kRowBytes, kThreads>;
  static constexpr int kStageBytes = Loader::kBytesA + Loader::kBytesB;
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024;  // room to align the swizzle pattern
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerMultiprocessor)
    conv2d_wgmma(const __grid_constant__ ConvProblem problem) {
#if defined(FASTCNN_HAS_WGMMA)
  using T = typename Tile::Type;
  using Loader = typename Tile::Loader;

  int32_t column_tile;
  const int32_t row_tile = problem.by_column_tiles.divide(static_cast<int32_t>(blockIdx.x), column_tile);
  const int first_row = row_tile * Tile::kRows;
  const int first_column = column_tile * Tile::kColumns;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warpgroup = warp / 4;

  unsigned char* shared = dynamic_shared();
  shared += (1024 - shared_address(shared) % 1024) % 1024;
  const uint32_t stages = shared_address(shared);
  const Loader loader(problem, 0, first_row, first_column, thread);
  const int tiles = (problem.shape.reduction + Loader::kDepth - 1) / Loader::kDepth;

  float acc[Tile::kPieces][Tile::kPieceColumns / 2] = {};

  const auto multiply = [&](uint32_t stage) {
    const uint32_t tile_a = stage + warpgroup * 64 * Tile::kRowBytes, tile_b = stage + Loader::kBytesA;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Loader::kDepth / 16; ++step) {
#pragma unroll
      for (int piece = 0; piece < Tile::kPieces; ++piece) {
        wgmma<T, Tile::kPieceColumns>(
            acc[piece], wgmma_descriptor(tile_a + step * 32),
            wgmma_descriptor(tile_b + piece * Tile::kPieceColumns * Tile::kRowBytes + step * 32));
      }
    }
    wgmma_commit();
  };

  if constexpr (Tile::kPath == LoadPath::async_vectors) {
    constexpr int kAhead = Tile::kStages - 1;
#pragma unroll
    for (int t = 0; t < kAhead; ++t) {
      const uint32_t stage = stages + t * Tile::kStageBytes;
      if (t < tiles) loader.copy_async(t, stage, stage + Loader::kBytesA);
      copy_async_commit();
    }
    int filled = kAhead, read = 0;  // stages, counted modulo kStages
    for (int t = 0; t < tiles; ++t) {
      copy_async_wait<kAhead - 1>();
      wgmma_wait<0>();
      fence_async_proxy();
      __syncthreads();
      multiply(stages + read * Tile::kStageBytes);
      read = read + 1 == Tile::kStages ? 0 : read + 1;
      if (t + kAhead < tiles) {
        const uint32_t stage = stages + filled * Tile::kStageBytes;
        loader.copy_async(t + kAhead, stage, stage + Loader::kBytesA);
      }
      copy_async_commit();
      filled = filled + 1 == Tile::kStages ? 0 : filled + 1;
    }
  } else {
    StagedTile<Loader> staged;
    for (int t = -1; t < tiles; ++t) {
      const bool more = t + 1 < tiles;
      const uint32_t next = stages + (t + 1) % 2 * Tile::kStageBytes;
      if (more) {
        load_vectors_a<T>(loader, t + 1, staged);
        loader.copy_async_b(t + 1, next + Loader::kBytesA);
        copy_async_commit();
      }
      if (t >= 0) multiply(stages + t % 2 * Tile::kStageBytes);
      if (more) {
        apply_prologue<T, true>(loader, 0, t + 1, staged);
        store_staged_a(loader, staged, next);
      }
      copy_async_wait<0>();
      wgmma_wait<0>();
      fence_async_proxy();
      __syncthreads();
    }
  }
  wgmma_wait<0>();
#pragma unroll
  for (int piece = 0; piece < Tile::kPieces; ++piece) hold(acc[piece]);
  copy_async_wait<0>();
  __syncthreads();  // the slabs below reuse the stages

  float* slab = reinterpret_cast<float*>(shared + warp * kSlabBytes);
#pragma unroll
  for (int piece = 0; piece < Tile::kPieces; ++piece) {
#pragma unroll
    for (int part = 0; part < Tile::kPieceColumns / kSlabColumns; ++part) {
      const int column = first_column + piece * Tile::kPieceColumns + part * kSlabColumns;
      if (column >= problem.shape.filters) continue;
#pragma unroll
      for (int atom = 0; atom < 4; ++atom) accumulator_to_slab(slab, atom, &acc[piece][(part * 4 + atom) * 4], lane);
      __syncwarp();
      SlabEpilogue<T>(problem, 0, column, lane).store_rows(slab, first_row + warp * 16);
      __syncwarp();
    }
  }
#else
  __trap();  // not compiled for sm_90a: the dispatcher must not come here
#endif
}

template <typename Tile>
static void launch_wgmma_tile(const char* name, ConvProblem problem, const LaunchTarget& target) {
  const int64_t column_tiles = ceil_divide(problem.shape.filters, Tile::kColumns);
  const int64_t row_tiles = ceil_divide(problem.shape.rows, Tile::kRows);
  problem.by_column_tiles = FastDivisor(column_tiles);
  const dim3 grid(static_cast<unsigned>(column_tiles * row_tiles));
  launch<conv2d_wgmma<Tile>>(name, target.device, grid, Tile::kThreads, Tile::kSharedBytes, target.stream, problem);
}

template <typename T>
void launch_conv2d_wgmma(const ConvProblem& problem, LoadPath path, int tile_columns, const LaunchTarget& target) {
  constexpr LoadPath kAsync = LoadPath::async_vectors, kStaged = LoadPath::staged_vectors;
  if (path == kStaged) {
    if (tile_columns == 64) {
      launch_wgmma_tile<WgmmaTile<T, 64, kStaged, 2>>("conv2d wgmma 128x64 staged", problem, target);
    } else {
      launch_wgmma_tile<WgmmaTile<T, 128, kStaged, 2>>("conv2d wgmma 128x128 staged", problem, target);
    }
  } else if (tile_columns == 64) {
    launch_wgmma_tile<WgmmaTile<T, 64, kAsync, 4>>("conv2d wgmma 128x64", problem, target);
  } else if (tile_columns == 128) {
    launch_wgmma_tile<WgmmaTile<T, 128, kAsync, 3>>("conv2d wgmma 128x128", problem, target);
  } else {
    launch_wgmma_tile<WgmmaTile<T, 256, kAsync, 4>>("conv2d wgmma 128x256", problem, target);
  }
}

template void launch_conv2d_wgmma<__nv_bfloat16>(const ConvProblem&, LoadPath, int, const LaunchTarget&);
template void launch_conv2d_wgmma<__half>(const ConvProblem&, LoadPath, int, const LaunchTarget&);

}  // namespace fastcnn::cuda
