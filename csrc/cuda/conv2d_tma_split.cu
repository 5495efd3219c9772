// The kernel of conv2d_tma.cu with each tile's reduction split over a cluster of blocks, for grids of few tiles and
// long reductions: 512 channels at 7x7 and batch 1 are 8 tiles of 72 stages, one behind the other on 8 of 132
// multiprocessors.
//
//   out[m, k] = act(sum_j A[m, j] * B[k, j] * scale[k] + bias[k] + residual[m, k])       as in conv2d_mma.cuh
//
// Work: a cluster of 2, 4 or 8 blocks per tile of 128 pixels by 64 or 128 filters; the block of rank r takes the r-th
//   share of the reduction. Three warpgroups: one copies, two multiply 64 pixels each, with a prologue (1x1) as there.
// Sum: each block lays its accumulators down in its own shared memory; then each reads every split-th row of the tile
//   (the same number of real rows for all) from all blocks of the cluster, adds them in the order of their ranks and
//   stores it. So nothing passes through global memory, and the same call always gives the same bits.
// Order: the cluster's barrier stands between writing and reading the accumulators, and a second time between the last
//   read and a block's end, as its shared memory ends with it. All threads of all blocks take part in both.
// Shared memory: the stages, and the block's accumulators in rows of kColumns + 8 floats: a half-warp's 8-byte stores
//   fall into 32 different banks.
// Registers: accumulators, then a thread's 8 columns from all blocks, their loads in flight together.
// Floor: the filters once through DRAM; reading split * 4 bytes of distributed shared memory for each output.
#include "conv2d_problem.h"
#include "conv2d_tma_operands.h"
#include "device/numeric.cuh"
#include "device/tma_stages.cuh"
#include "host.h"

namespace fastcnn::cuda {

struct SplitConvolution : TmaOperands {
  void* out;
  const void* residual;  // may be null
  int64_t out_stride, residual_stride;
  int32_t rows;
  int32_t log2_split;
};

template <typename Tile>
struct SplitLayout {
  static constexpr int kPitch = Tile::kColumns + 8;  // floats in a row of accumulators
  static constexpr int kStagesBytes = Tile::kStages * Tile::kStageBytes, kSumBytes = Tile::kRows * kPitch * 4;
  static constexpr int kSharedBytes = kStagesBytes + kSumBytes + 1024 + kTmaBarrierBytes;
  static_assert(kSharedBytes + (Tile::kPrologue ? kMostPrologueChannels * 8 : 0) <= 227 * 1024,
                "one block must fit a multiprocessor");
};

#if defined(FASTCNN_HAS_WGMMA)

namespace {

constexpr int kMultipliers = 256;  // threads that multiply

// A warpgroup's 64 rows of the tile, from the accumulators' layout to rows.
template <typename Tile>
__device__ __forceinline__ void store_accumulators(const TmaAccumulator<Tile>& acc, uint32_t sums, int group,
                                                   int thread) {
  static_assert(Tile::kGroupRows == 64, "one accumulator of 64 rows");
  const int warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int row = group * 64 + warp * 16 + part * 8 + lane / 4;
    const uint32_t at = sums + (row * SplitLayout<Tile>::kPitch + lane % 4 * 2) * 4;
#pragma unroll
    for (int atom = 0; atom < Tile::kAtoms; ++atom) {
      store_shared_8(at + atom * 32, make_float2(acc[0][atom * 4 + part * 2], acc[0][atom * 4 + part * 2 + 1]));
    }
  }
}

// This block's rows of the tile. A thread of the 256 has 8 columns of every (256 / chunks)-th of them. Called between
// arriving at the cluster's barrier and waiting there, which happens behind the loads that need no other block.
template <typename Tile, int kSplit>
__device__ __forceinline__ void finish_rows(const SplitConvolution& problem, uint32_t sums, int rank, int first_row,
                                            int first_column, int thread) {
  using T = typename Tile::Type;
  constexpr int kWidth = kVector<T>, kChunks = Tile::kColumns / kWidth, kRowStep = kMultipliers / kChunks;
  constexpr int kRows = Tile::kRows / kSplit, kPasses = (kRows + kRowStep - 1) / kRowStep;
  const int chunk = thread % kChunks, column = first_column + chunk * kWidth;
  float scale[kWidth], bias[kWidth];
  load_coefficients<kWidth>(scale, problem.scale, column, problem.filters, 1.0f);
  load_coefficients<kWidth>(bias, problem.bias, column, problem.filters, 0.0f);
  int row[kPasses];  // of the tile, -1: none
  uint4 residual[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int part_row = thread / kChunks + pass * kRowStep;
    row[pass] = part_row * kSplit + rank;
    if (part_row >= kRows || first_row + row[pass] >= problem.rows || column >= problem.filters) row[pass] = -1;
    residual[pass] = make_uint4(0, 0, 0, 0);
    if (row[pass] >= 0 && problem.residual != nullptr) {
      residual[pass] = load_16(static_cast<const T*>(problem.residual) +
                               static_cast<int64_t>(first_row + row[pass]) * problem.residual_stride + column);
    }
  }
  cluster_wait();
  float sum[kPasses][kWidth];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    if (row[pass] < 0) continue;
    const uint32_t at = sums + (row[pass] * SplitLayout<Tile>::kPitch + chunk * kWidth) * 4;
    float4 found[kSplit][2];
#pragma unroll
    for (int source = 0; source < kSplit; ++source) {
      const uint32_t there = cluster_address(at, source);
      found[source][0] = load_cluster_16(there);
      found[source][1] = load_cluster_16(there + 16);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const auto value = [&](int source) {
        const float4& four = found[source][i / 4];
        return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
      };
      sum[pass][i] = value(0);
#pragma unroll
      for (int source = 1; source < kSplit; ++source) sum[pass][i] += value(source);
    }
  }
  cluster_arrive();  // nothing is read from other blocks any more
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    if (row[pass] < 0) continue;
    T added[kWidth];
    memcpy(added, &residual[pass], 16);
    float y[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      y[i] = sum[pass][i] * scale[i] + bias[i];
      if (problem.residual != nullptr) y[i] += to_float(added[i]);
      y[i] = problem.relu ? relu(y[i]) : y[i];
    }
    store<kWidth>(
        static_cast<T*>(problem.out) + static_cast<int64_t>(first_row + row[pass]) * problem.out_stride + column, y);
  }
}

template <typename Tile>
__device__ __forceinline__ void compute_share(const SplitConvolution& problem, uint32_t stages, uint32_t sums,
                                              const TmaBarriers<Tile>& barriers, int tile, int rank, int first,
                                              int last, int group, int thread) {
  const PrologueFactors factors(problem, barriers.first + kTmaBarrierBytes);
  if constexpr (Tile::kPrologue) factors.fill(problem, group * 128 + thread);
  StageRing<Tile::kStages> ring;
  StageState state = {factors};
  TmaAccumulator<Tile> acc;
  multiply_blocks<Tile>(problem, stages, barriers, ring, group, thread, first, last, state, acc);
  end_products<Tile>(barriers, state, thread % 32, acc);
  store_accumulators<Tile>(acc, sums, group, thread);
  cluster_arrive();
  int32_t column_tile;
  const int first_row = problem.by_column_tiles.divide(tile, column_tile) * Tile::kRows;
  const int first_column = column_tile * Tile::kColumns, multiplier = group * 128 + thread;
  if (problem.log2_split == 1) {
    finish_rows<Tile, 2>(problem, sums, rank, first_row, first_column, multiplier);
  } else if (problem.log2_split == 2) {
    finish_rows<Tile, 4>(problem, sums, rank, first_row, first_column, multiplier);
  } else {
    finish_rows<Tile, 8>(problem, sums, rank, first_row, first_column, multiplier);
  }
  cluster_wait();  // no block's shared memory ends before all have read it
}

}  // namespace

#endif

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    conv2d_tma_split(const __grid_constant__ SplitConvolution problem) {
#if defined(FASTCNN_HAS_WGMMA)
  const int thread = static_cast<int>(threadIdx.x), warpgroup = uniform(thread / 128);
  // A cluster is `split` neighbours of the grid's only axis: its blocks' ranks are the remainders.
  const int tile = static_cast<int>(blockIdx.x) >> problem.log2_split;
  const int rank = static_cast<int>(blockIdx.x) - (tile << problem.log2_split);
  const int blocks = problem.filter_h * problem.filter_w * problem.channel_blocks;
  const int first = (blocks * rank) >> problem.log2_split, last = (blocks * (rank + 1)) >> problem.log2_split;

  unsigned char* shared = dynamic_shared();
  const uint32_t start = shared_address(shared);
  const uint32_t stages = start + (1024 - start % 1024) % 1024;
  const uint32_t sums = stages + SplitLayout<Tile>::kStagesBytes;
  const TmaBarriers<Tile> barriers = {sums + SplitLayout<Tile>::kSumBytes};
  if (thread == 0) {
    prefetch_tensor_map(problem.input);
    prefetch_tensor_map(problem.weight);
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_init(barriers.full(stage), 1);
      barrier_init(barriers.empty(stage), 8);  // warps that multiply
    }
    barrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_begin();
  if (warpgroup == 0) {
    release_registers<40>();
    if (thread == 0) {
      StageRing<Tile::kStages> ring;
      const TileOrigin origin = TileOrigin::of<Tile>(problem, tile);
      const int with_filters = copy_first_filters<Tile>(problem, stages, barriers, origin.filter, first, last);
      wait_for_earlier_kernels();
      copy_blocks<Tile>(problem, stages, barriers, ring, origin, first, last, with_filters);
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    cluster_arrive();
    cluster_wait();
  } else {
    claim_registers<232>();
    wait_for_earlier_kernels();
    compute_share<Tile>(problem, stages, sums, barriers, tile, rank, first, last, warpgroup - 1,
                        thread - warpgroup * 128);
  }
#else
  __trap();  // not compiled for sm_90a: the dispatcher must not come here
#endif
}

namespace {

template <typename Tile>
void launch_split(const char* name, const ConvProblem& problem, int split, const LaunchTarget& target) {
  SplitConvolution convolution = {};
  set_operands(convolution, problem, kTypeOf16Bits<typename Tile::Type>, Tile::kRows, Tile::kColumns, Tile::kBlock);
  convolution.out = problem.out;
  convolution.out_stride = problem.out_stride;
  convolution.residual = problem.residual;
  convolution.residual_stride = problem.residual_stride;
  convolution.rows = problem.shape.rows;
  convolution.log2_split = split == 2 ? 1 : split == 4 ? 2 : 3;
  const dim3 grid(static_cast<unsigned>(convolution.tiles * split));
  launch_kernel<conv2d_tma_split<Tile>, true>(name, target.device, grid, split, Tile::kThreads,
                                              SplitLayout<Tile>::kSharedBytes + prologue_bytes<Tile>(convolution),
                                              target.stream, convolution);
}

}  // namespace

template <typename T>
void launch_conv2d_tma_split(const ConvProblem& problem, int tile_columns, int split, const LaunchTarget& target) {
  if (problem.has_prologue()) {
    launch_split<TmaTile<T, 64, 64, false, 7, true>>("conv2d tma 128x64 staged split", problem, split, target);
  } else if (tile_columns == 128) {
    launch_split<TmaTile<T, 64, 128, false, 4>>("conv2d tma 128x128 split", problem, split, target);
  } else {
    launch_split<TmaTile<T, 64, 64, false, 7>>("conv2d tma 128x64 split", problem, split, target);
  }
}

template void launch_conv2d_tma_split<__nv_bfloat16>(const ConvProblem&, int, int, const LaunchTarget&);
template void launch_conv2d_tma_split<__half>(const ConvProblem&, int, int, const LaunchTarget&);

}  // namespace fastcnn::cuda
