// Convolution on Hopper with bulk copies: TMA (im2col) + wgmma, warp-specialised and persistent. bf16 and fp16; groups
// of whole blocks of 64 channels and filters.
//
//   out[m, k] = act(sum_j A[m, j] * B[k, j] * scale[k] + bias[k] + residual[m, k])       as in conv2d_mma.cuh
//
// Work: one block per multiprocessor walks over tiles of the output, columns (filters) first, so that blocks that are
//   at work together share pixels in L2. Three warpgroups: one copies, two multiply, in one of two ways:
//     together   a tile is 2 x kGroupRows pixels, half of it for each warpgroup: fewest operand bytes per product
//     in turns   a tile is kGroupRows pixels and belongs to one warpgroup; while it stores, the other multiplies. A
//                warpgroup begins when the other has all its stages: a barrier's parity tells only neighbouring rounds
//                of a stage apart
// Copies: a stage holds one tap's block of 64 channels of A (pixels) and B (filters). Where 64 would be half empty (96,
//   160 ... channels), "by 32" it holds two blocks of 32, "by 96" one of 96 (device/tma_stages.cuh). The copy engine
//   computes every address, fills padding with zeros and reports to the stage's `full` barrier; warps report to `empty`
//   when a stage has been multiplied.
// With a prologue (1x1 filters without padding): the warpgroup applies it in place to its rows of A when a stage has
//   landed, while the tensor cores still work on the stage before.
// Before an earlier kernel has ended: barriers, and the filters of the first stages.
// Shared memory: the stages, and for each warpgroup its part of the output, into which the copy engine brings the
//   residual during the multiplication and from which it stores the result: no thread computes an output address.
// Registers: accumulators only; operands go from shared memory to the tensor cores.
// Floor: as in conv2d_mma.cuh.
#include <algorithm>

#include "conv2d_problem.h"
#include "conv2d_tma_operands.h"
#include "device/tma_epilogue.cuh"
#include "device/tma_stages.cuh"
#include "host.h"
#include "tensor_map.h"

namespace fastcnn::cuda {

struct TmaConvolution : TmaOperands {
  TensorMap residual, out;
  bool has_residual;
};

#if defined(FASTCNN_HAS_WGMMA)

// One thread feeds the block.
template <typename Tile>
__device__ __forceinline__ void copy_tiles(const TmaConvolution& problem, uint32_t stages,
                                           const TmaBarriers<Tile>& barriers) {
  StageRing<Tile::kStages> ring;
  const int first_tile = static_cast<int>(blockIdx.x);
  int with_filters =
      copy_first_filters<Tile>(problem, stages, barriers, TileOrigin::of<Tile>(problem, first_tile).filter, 0,
                               problem.filter_h * problem.filter_w * problem.channel_blocks);
  wait_for_earlier_kernels();
  for (int tile = first_tile; tile < problem.tiles; tile += static_cast<int>(gridDim.x)) {
    const TileOrigin origin = TileOrigin::of<Tile>(problem, tile);
    if constexpr (Tile::kBlock != kTensorMapRow) {
      copy_blocks<Tile>(problem, stages, barriers, ring, origin, 0,
                        problem.filter_h * problem.filter_w * problem.channel_blocks);
      continue;
    }
    int tap = 0;
    for (int r = 0; r < problem.filter_h; ++r) {
      for (int s = 0; s < problem.filter_w; ++s, ++tap) {
        for (int block = 0; block < problem.channel_blocks; ++block) {
          const uint32_t to = stages + ring.stage * Tile::kStageBytes, full = barriers.full(ring.stage);
          const bool has_filters = with_filters-- > 0;
          if (!has_filters) {
            barrier_wait(barriers.empty(ring.stage), ring.parity ^ 1);
            barrier_arrive_expecting(full, Tile::kStageBytes);
            copy_box_3d(to + Tile::kBytesA, problem.weight, full, block * kTensorMapRow, tap, origin.filter);
          }
          copy_pixels(to, problem.input, full, origin.channel + block * kTensorMapRow, origin.w, origin.h, origin.n,
                      s * problem.dilation_w, r * problem.dilation_h);
          ring.advance();
        }
      }
    }
  }
}

// acc = the product of one tile. Leaves `ring` behind the tile's last stage.
template <typename Tile>
__device__ __forceinline__ void multiply_tile(const TmaConvolution& problem, uint32_t stages,
                                              const TmaBarriers<Tile>& barriers, const PrologueFactors& factors,
                                              StageRing<Tile::kStages>& ring, int group, int thread,
                                              TmaAccumulator<Tile>& acc) {
  const int lane = thread % 32;
  const int taps = problem.filter_h * problem.filter_w;
  StageState state = {factors};
  if constexpr (Tile::kBlock != kTensorMapRow) {
    multiply_blocks<Tile>(problem, stages, barriers, ring, group, thread, 0, taps * problem.channel_blocks, state, acc);
  } else {
    clear<Tile>(acc);
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
#pragma unroll 1
      for (int block = 0; block < problem.channel_blocks; ++block) {
        const bool whole = block + 1 < problem.channel_blocks || problem.last_steps == 4;
        multiply_stage<Tile>(problem, stages, barriers, ring, group, thread, whole, problem.last_steps,
                             block * kTensorMapRow + thread % 8 * 8, state, acc);
      }
    }
  }
  if (Tile::kInTurns && lane == 0) barrier_arrive(barriers.turn(1 - group));
  end_products<Tile>(barriers, state, lane, acc);
}

// The epilogue, in the accumulators' own layout: a lane holds pairs of columns, its quad 16 bytes of a row. In the
// swizzled rows of shared memory the eight rows of an access fall into different banks. The loads of several pairs are
// in flight together.
template <typename Tile, bool kResidual>
__device__ __forceinline__ void finish_tile(const TmaConvolution& problem, const TmaAccumulator<Tile>& acc,
                                            uint32_t output, const float2* coefficients, int warp_of_group, int lane) {
  using T = typename Tile::Type;
  constexpr int kBatch = 4, kParts = Tile::kGroupRows / 32;  // atoms together; rows 0-7, 8-15 of each 64
  const int row = warp_of_group * 16 + lane / 4, pair = lane % 4;
#pragma unroll
  for (int first = 0; first < Tile::kAtoms; first += kBatch) {
    float4 factors[kBatch];  // scale, bias of a column and of the next
    uint32_t residual[kBatch][kParts], at[kBatch][kParts];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int atom = first + i;
      factors[i] = *reinterpret_cast<const float4*>(coefficients + atom * 8 + pair * 2);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int at_row = row + part / 2 * 64 + part % 2 * 8;
        at[i][part] = output + atom / 8 * Tile::kGroupRows * 128 + tile_offset<128>(at_row, atom % 8) + pair * 4;
        if constexpr (kResidual) residual[i][part] = load_shared_4(at[i][part]);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float* values = &acc[part / 2][(first + i) * 4 + part % 2 * 2];
        float x = values[0] * factors[i].x + factors[i].y, y = values[1] * factors[i].z + factors[i].w;
        if constexpr (kResidual) {
          const float2 added = unpack(residual[i][part], T());
          x += added.x;
          y += added.y;
        }
        store_shared_4(at[i][part], pack<T>(problem.relu ? relu(x) : x, problem.relu ? relu(y) : y));
      }
    }
  }
}

// What one multiplying warpgroup does with its tiles.
template <typename Tile>
__device__ __forceinline__ void compute_tiles(const TmaConvolution& problem, uint32_t stages, uint32_t output,
                                              float2* coefficients, const TmaBarriers<Tile>& barriers, int group,
                                              int thread) {
  const int lane = thread % 32, warp = thread / 32;
  const int blocks_of_tile = problem.filter_h * problem.filter_w * problem.channel_blocks;
  const int stages_of_tile = (blocks_of_tile + Tile::kBlocksOfStage - 1) / Tile::kBlocksOfStage;
  const int step = static_cast<int>(gridDim.x) * (Tile::kInTurns ? 2 : 1);
  const int rows_of_group = Tile::kInTurns ? 0 : group * Tile::kGroupRows;
  int tile = static_cast<int>(blockIdx.x);
  const PrologueFactors factors(problem, barriers.first + kTmaBarrierBytes);
  if constexpr (Tile::kPrologue) factors.fill(problem, group * 128 + thread);
  StageRing<Tile::kStages> ring;
  if (Tile::kInTurns && group == 1) {
    tile += static_cast<int>(gridDim.x);
    ring.advance(stages_of_tile);
  }
  uint32_t residual_parity = 0, turn_parity = group == 0 ? 1 : 0;  // the first turn is group 0's
  for (; tile < problem.tiles; tile += step) {
    int32_t column_tile;
    const int32_t row_tile = problem.by_column_tiles.divide(tile, column_tile);
    const int first_row = row_tile * Tile::kRows + rows_of_group, first_column = column_tile * Tile::kColumns;
    if (thread == 0) {
      store_wait_read();  // the tile before has left `output`
      if (problem.has_residual) {
        int boxes = 0;
        for (int x = 0; x < Tile::kColumns; x += kTensorMapRow) boxes += first_column + x < problem.filters;
        barrier_arrive_expecting(barriers.residual(group), boxes * Tile::kGroupRows * 128);
        for (int box = 0; box < boxes; ++box) {
          copy_box_2d(output + box * Tile::kGroupRows * 128, problem.residual, barriers.residual(group),
                      first_column + box * kTensorMapRow, first_row);
        }
      }
    }
    stage_coefficients<Tile::kColumns>(problem, coefficients, first_column, thread);
    if (Tile::kInTurns) {
      barrier_wait(barriers.turn(group), turn_parity);
      turn_parity ^= 1;
    }
    TmaAccumulator<Tile> acc;
    multiply_tile<Tile>(problem, stages, barriers, factors, ring, group, thread, acc);
    if (Tile::kInTurns) ring.advance(stages_of_tile);  // those of the other warpgroup's tile
    warpgroup_barrier(group);  // thread 0 has seen `output` free, and the coefficients are there
    if (problem.has_residual) {
      barrier_wait(barriers.residual(group), residual_parity);
      residual_parity ^= 1;
      finish_tile<Tile, true>(problem, acc, output, coefficients, warp, lane);
    } else {
      finish_tile<Tile, false>(problem, acc, output, coefficients, warp, lane);
    }
    fence_async_proxy();
    warpgroup_barrier(group);
    if (thread == 0) {
      for (int x = 0; x < Tile::kColumns && first_column + x < problem.filters; x += kTensorMapRow) {
        store_box_2d(problem.out, output + x / kTensorMapRow * Tile::kGroupRows * 128, first_column + x, first_row);
      }
      store_commit();
    }
  }
  if (thread == 0) store_wait();
}

#endif

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) conv2d_tma(const __grid_constant__ TmaConvolution problem) {
#if defined(FASTCNN_HAS_WGMMA)
  const int thread = static_cast<int>(threadIdx.x), warpgroup = uniform(thread / 128);
  unsigned char* shared = dynamic_shared();
  shared += (1024 - shared_address(shared) % 1024) % 1024;
  const uint32_t stages = shared_address(shared);
  const uint32_t output = stages + Tile::kStages * Tile::kStageBytes;
  const uint32_t after_output = output + 2 * Tile::kOutputBytes;
  float2* coefficients = reinterpret_cast<float2*>(shared + (after_output - stages));
  const TmaBarriers<Tile> barriers = {after_output + 2 * Tile::kColumns * 8};
  if (thread == 0) {
    prefetch_tensor_map(problem.input);
    prefetch_tensor_map(problem.weight);
    prefetch_tensor_map(problem.out);
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_init(barriers.full(stage), 1);
      barrier_init(barriers.empty(stage), Tile::kInTurns ? 4 : 8);  // warps that multiply
    }
    for (int group = 0; group < 2; ++group) {
      barrier_init(barriers.residual(group), 1);
      barrier_init(barriers.turn(group), 4);  // warps of the other one
    }
    barrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_begin();
  if (warpgroup == 0) {
    release_registers<40>();
    if (thread == 0) copy_tiles<Tile>(problem, stages, barriers);
  } else {
    claim_registers<232>();
    wait_for_earlier_kernels();
    const int group = warpgroup - 1;
    compute_tiles<Tile>(problem, stages, output + group * Tile::kOutputBytes, coefficients + group * Tile::kColumns,
                        barriers, group, thread - warpgroup * 128);
  }
#else
  __trap();  // not compiled for sm_90a: the dispatcher must not come here
#endif
}

namespace {

// The output's pixels, or the residual's.
TensorView rows_of(const ConvProblem& problem, DType dtype, const void* data, int64_t pixel_stride) {
  return view_of(data, dtype, problem.shape.rows, 1, 1, filters_of_all_groups(problem), pixel_stride);
}

template <typename Tile>
void launch_tma_tile(const char* name, const ConvProblem& problem, const LaunchTarget& target) {
  constexpr DType kDType = kTypeOf16Bits<typename Tile::Type>;
  TmaConvolution convolution = {};
  set_operands(convolution, problem, kDType, Tile::kRows, Tile::kColumns, Tile::kBlock);
  convolution.out = matrix_map(rows_of(problem, kDType, problem.out, problem.out_stride), Tile::kGroupRows);
  convolution.has_residual = problem.residual != nullptr;
  if (convolution.has_residual) {
    const TensorView residual = rows_of(problem, kDType, problem.residual, problem.residual_stride);
    convolution.residual = matrix_map(residual, Tile::kGroupRows);
  }
  const int64_t blocks = std::min<int64_t>(convolution.tiles, device_facts(target.device).multiprocessors);
  launch_early<conv2d_tma<Tile>>(name, target.device, dim3(static_cast<unsigned>(blocks)), Tile::kThreads,
                                 Tile::kSharedBytes + prologue_bytes<Tile>(convolution), target.stream, convolution);
}

}  // namespace

bool tma_fits(const ConvProblem& problem, DType dtype) {
  const ConvShape& shape = problem.shape;
  const int64_t taps = taps_of(shape), filter_w = shape.by_filter_w.divisor, filter_h = taps / filter_w;
  const auto aligned = [](const void* data, int64_t stride) { return aligned_16(data) && stride % 8 == 0; };
  const bool whole_blocks = shape.channels % kTensorMapRow == 0 && shape.filters % kTensorMapRow == 0;
  const bool plain_1x1 = taps == 1 && shape.pad_top == 0 && shape.pad_left == 0;  // no padded pixel: see pixel_map_fits
  return dtype != DType::f32 && (problem.groups == 1 || (whole_blocks && !problem.has_prologue())) &&
         (!problem.has_prologue() || (plain_1x1 && shape.channels <= kMostPrologueChannels)) && problem.vector_output &&
         aligned(problem.input, shape.pixel_stride) && aligned(problem.weight, shape.channels) &&
         problem.weight_row_stride % 8 == 0 && (filter_h - 1) * shape.dilation_h < 256 &&
         (filter_w - 1) * shape.dilation_w < 256 && pixel_map_fits(input_of(problem, dtype), pixels_of(problem, 1));
}

template <typename T>
void launch_conv2d_tma(const ConvProblem& problem, int tile_rows, int tile_columns, bool in_turns, int block,
                       const LaunchTarget& target) {
  constexpr int kHalf = kTensorMapHalfRow, kWide = kTensorMapWideBlock;
  if (block == kHalf && in_turns && tile_columns == 128) {
    launch_tma_tile<TmaTile<T, 128, 128, true, 4, false, kHalf>>("conv2d tma 128x128 in turns by 32", problem, target);
  } else if (block == kHalf && in_turns) {
    launch_tma_tile<TmaTile<T, 128, 64, true, 6, false, kHalf>>("conv2d tma 128x64 in turns by 32", problem, target);
  } else if (block == kHalf) {
    launch_tma_tile<TmaTile<T, 128, 128, false, 3, false, kHalf>>("conv2d tma 256x128 by 32", problem, target);
  } else if (block == kWide && in_turns && tile_columns == 128) {
    launch_tma_tile<TmaTile<T, 128, 128, true, 3, false, kWide>>("conv2d tma 128x128 in turns by 96", problem, target);
  } else if (block == kWide && in_turns) {
    launch_tma_tile<TmaTile<T, 128, 64, true, 5, false, kWide>>("conv2d tma 128x64 in turns by 96", problem, target);
  } else if (block == kWide) {
    launch_tma_tile<TmaTile<T, 128, 128, false, 2, false, kWide>>("conv2d tma 256x128 by 96", problem, target);
  } else if (problem.has_prologue()) {
    if (tile_columns == 128) {
      launch_tma_tile<TmaTile<T, 64, 128, false, 5, true>>("conv2d tma 128x128 staged", problem, target);
    } else {
      launch_tma_tile<TmaTile<T, 64, 64, false, 7, true>>("conv2d tma 128x64 staged", problem, target);
    }
  } else if (in_turns && tile_columns == 128) {
    launch_tma_tile<TmaTile<T, 128, 128, true, 4>>("conv2d tma 128x128 in turns", problem, target);
  } else if (in_turns && tile_columns == 64) {
    launch_tma_tile<TmaTile<T, 128, 64, true, 6>>("conv2d tma 128x64 in turns", problem, target);
  } else if (in_turns) {
    launch_tma_tile<TmaTile<T, 128, 32, true, 7>>("conv2d tma 128x32 in turns", problem, target);
  } else if (tile_rows == 256 && tile_columns == 128) {
    launch_tma_tile<TmaTile<T, 128, 128, false, 3>>("conv2d tma 256x128", problem, target);
  } else if (tile_rows == 256) {
    launch_tma_tile<TmaTile<T, 128, 64, false, 4>>("conv2d tma 256x64", problem, target);
  } else if (tile_columns == 128) {
    launch_tma_tile<TmaTile<T, 64, 128, false, 5>>("conv2d tma 128x128", problem, target);
  } else if (tile_columns == 64) {
    launch_tma_tile<TmaTile<T, 64, 64, false, 8>>("conv2d tma 128x64", problem, target);
  } else {
    launch_tma_tile<TmaTile<T, 64, 32, false, 9>>("conv2d tma 128x32", problem, target);
  }
}

template void launch_conv2d_tma<__nv_bfloat16>(const ConvProblem&, int, int, bool, int, const LaunchTarget&);
template void launch_conv2d_tma<__half>(const ConvProblem&, int, int, bool, int, const LaunchTarget&);

}  // namespace fastcnn::cuda
