// Convolution with stride 1 on Hopper whose filter taps share one patch of the input. bf16 and fp16; few filters.
//
//   out[n, p, q, k] = act(scale[k] * sum_{r, s, c} x[n, p + r - pad, q + s - pad, c] * w[k, r, s, c]
//                         + bias[k] + residual[n, p, q, k])
//
// Where filters are few, conv2d_tma.cu waits for L2: it brings every pixel once for each of the R * S taps. Here a
// patch of the input, the tile's pixels and their halo, comes once for all taps. In shared memory a pixel's 64 channels
// are a row of 128 bytes, so the pixels that tap (r, s) multiplies are the same rows, r * (patch width) + s further:
// another start address in wgmma's descriptor. The swizzle goes by address, so it holds for any start.
//
// Work: one block per multiprocessor. A block keeps the filters of one column tile (32 or 64 of K) in shared memory for
//   good and walks over tiles of pixels: tile_n images x tile_h x tile_w. The patch is multiplied as it lies, halo
//   columns included (their results are dropped): two warpgroups take 128 rows each, a third one copies.
// Shared memory: filters [tap][block of 64 channels][filter], a ring of patches (one for each block), the output tile.
// Registers: accumulators only.
// Floor: reading the input once (times the halo) and writing the output; multiplying 256 rows for each tile.
#include <algorithm>

#include "conv2d_patch_operands.h"
#include "device/numeric.cuh"
#include "device/patch_tiles.cuh"
#include "device/ptx.cuh"
#include "device/tile_layout.h"
#include "device/tma.cuh"
#include "device/tma_epilogue.cuh"
#include "device/wgmma.cuh"
#include "host.h"
#include "tensor_map.h"

namespace fastcnn::cuda {

#if defined(FASTCNN_HAS_WGMMA)

namespace {

constexpr int kGroupRows = kPatchRows / 2;

// Barriers: the filters' and the residual's, then full and empty of each stage.
__device__ __forceinline__ uint32_t filters_barrier(uint32_t barriers) {
  return barriers;
}
__device__ __forceinline__ uint32_t residual_barrier(uint32_t barriers) {
  return barriers + 8;
}
__device__ __forceinline__ uint32_t full_barrier(uint32_t barriers, int stage) {
  return barriers + 16 + stage * 16;
}
__device__ __forceinline__ uint32_t empty_barrier(uint32_t barriers, int stage) {
  return barriers + 24 + stage * 16;
}

template <int kColumns>
__device__ __forceinline__ void copy_patches(const PatchConvolution& problem, uint32_t filters, uint32_t patches,
                                             uint32_t barriers, int first_tile, int tile_step, int first_column) {
  const PatchPlan& plan = problem.plan;
  const int taps = problem.filter_h * problem.filter_w;
  barrier_arrive_expecting(filters_barrier(barriers), taps * problem.channel_blocks * kColumns * 128);
  for (int tap = 0, at = 0; tap < taps; ++tap) {
    for (int block = 0; block < problem.channel_blocks; ++block, ++at) {
      copy_box_3d(filters + at * kColumns * 128, problem.weight, filters_barrier(barriers), block * kTensorMapRow, tap,
                  first_column);
    }
  }
  wait_for_earlier_kernels();
  const int first_channel = problem.by_group_filters.quotient(first_column) * problem.channels;
  PatchRing ring;
  for (int tile = first_tile; tile < plan.tiles; tile += tile_step) {
    const PatchOrigin origin(problem, tile);
    for (int block = 0; block < problem.channel_blocks; ++block) {
      barrier_wait(empty_barrier(barriers, ring.stage), ring.parity ^ 1);
      barrier_arrive_expecting(full_barrier(barriers, ring.stage), plan.patch_pixels() * 128);
      copy_box_4d(patches + ring.stage * plan.patch_bytes(), problem.input, full_barrier(barriers, ring.stage),
                  first_channel + block * kTensorMapRow, origin.w - problem.pad_left, origin.h - problem.pad_top,
                  origin.n);
      ring.advance(plan.stages);
    }
  }
}

template <int kColumns>
using PatchAccumulator = float[2][kColumns / 2];

template <typename T, int kColumns>
__device__ __forceinline__ void multiply_patch_step(PatchAccumulator<kColumns>& acc, uint32_t rows, uint32_t filters,
                                                    int step) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    wgmma<T, kColumns>(acc[half], wgmma_descriptor(rows + half * 64 * 128 + step * 32),
                       wgmma_descriptor(filters + step * 32));
  }
}

template <typename T, int kColumns>
__device__ __forceinline__ void multiply_patches(const PatchConvolution& problem, uint32_t filters, uint32_t patches,
                                                 uint32_t barriers, PatchRing& ring, int group, int lane,
                                                 PatchAccumulator<kColumns>& acc) {
  const PatchPlan& plan = problem.plan;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) acc[half][i] = 0.0f;
  }
  const int taps = problem.filter_h * problem.filter_w;
  for (int block = 0; block < problem.channel_blocks; ++block) {
    barrier_wait(full_barrier(barriers, ring.stage), ring.parity);
    const uint32_t patch = patches + ring.stage * plan.patch_bytes() + group * kGroupRows * 128;
    const bool whole = block + 1 < problem.channel_blocks || problem.last_steps == 4;
    int r = 0, s = 0;
    wgmma_fence();
    for (int tap = 0; tap < taps; ++tap) {
      const uint32_t rows = patch + (r * plan.patch_w + s) * 128;
      const uint32_t columns = filters + (tap * problem.channel_blocks + block) * kColumns * 128;
      if (whole) {
#pragma unroll
        for (int step = 0; step < 4; ++step) multiply_patch_step<T, kColumns>(acc, rows, columns, step);
      } else {
        for (int step = 0; step < problem.last_steps; ++step) {
          multiply_patch_step<T, kColumns>(acc, rows, columns, step);
        }
      }
      if (++s == problem.filter_w) {
        s = 0;
        ++r;
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(empty_barrier(barriers, ring.stage));
    ring.advance(plan.stages);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) hold(acc[half]);
}

// The rows of the output tile that a thread's four rows of the patch become; -1 for halo.
struct PatchRows {
  int row[4];
  __device__ __forceinline__ PatchRows(const PatchConvolution& problem, int group, int warp_of_group, int lane) {
    const PatchPlan& plan = problem.plan;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int at = group * kGroupRows + part / 2 * 64 + part % 2 * 8 + warp_of_group * 16 + lane / 4;
      int32_t inside, w;
      const int32_t image = problem.by_patch_image.divide(at, inside);
      const int32_t h = problem.by_patch_w.divide(inside, w);
      const bool real = image < plan.tile_n && h < plan.tile_h && w < plan.tile_w;
      row[part] = real ? (image * plan.tile_h + h) * plan.tile_w + w : -1;
    }
  }
};

template <typename T, int kColumns, bool kResidual>
__device__ __forceinline__ void finish_patch(bool relu_output, const PatchAccumulator<kColumns>& acc, uint32_t output,
                                             const float2* coefficients, const PatchRows& rows, int lane) {
  const int pair = lane % 4;
#pragma unroll
  for (int atom = 0; atom < kColumns / 8; ++atom) {
    const float4 factors = *reinterpret_cast<const float4*>(coefficients + atom * 8 + pair * 2);
    uint32_t at[4], residual[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      at[part] = output + tile_offset<128>(rows.row[part] < 0 ? 0 : rows.row[part], atom) + pair * 4;
      if constexpr (kResidual) residual[part] = load_shared_4(at[part]);
    }
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float* values = &acc[part / 2][atom * 4 + part % 2 * 2];
      float x = values[0] * factors.x + factors.y, y = values[1] * factors.z + factors.w;
      if constexpr (kResidual) {
        const float2 added = unpack(residual[part], T());
        x += added.x;
        y += added.y;
      }
      if (rows.row[part] >= 0) {
        store_shared_4(at[part], pack<T>(relu_output ? relu(x) : x, relu_output ? relu(y) : y));
      }
    }
  }
}

}  // namespace

#endif

template <typename T, int kColumns>
__global__ void __launch_bounds__(3 * 128, 1) conv2d_patch(const __grid_constant__ PatchConvolution problem) {
#if defined(FASTCNN_HAS_WGMMA)
  const PatchPlan& plan = problem.plan;
  const int thread = static_cast<int>(threadIdx.x), warpgroup = uniform(thread / 128);
  int32_t column_tile;
  const int first_tile = problem.by_column_tiles.divide(static_cast<int32_t>(blockIdx.x), column_tile);
  const int tile_step = static_cast<int>(gridDim.x) / plan.column_tiles;
  const int first_column = column_tile * kColumns;

  unsigned char* shared = dynamic_shared();
  shared += (1024 - shared_address(shared) % 1024) % 1024;
  const uint32_t filters = shared_address(shared);
  const uint32_t patches = filters + plan.filter_bytes;
  const uint32_t output = patches + plan.stages * plan.patch_bytes();
  const uint32_t after_output = output + plan.output_bytes();
  float2* coefficients = reinterpret_cast<float2*>(shared + (after_output - filters));
  const uint32_t barriers = after_output + kColumns * 8;

  if (thread == 0) {
    prefetch_tensor_map(problem.input);
    prefetch_tensor_map(problem.weight);
    prefetch_tensor_map(problem.out);
    barrier_init(filters_barrier(barriers), 1);
    barrier_init(residual_barrier(barriers), 1);
    for (int stage = 0; stage < plan.stages; ++stage) {
      barrier_init(full_barrier(barriers, stage), 1);
      barrier_init(empty_barrier(barriers, stage), 8);  // warps that multiply
    }
    barrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_begin();

  if (warpgroup == 0) {
    release_registers<40>();
    if (thread == 0) {
      copy_patches<kColumns>(problem, filters, patches, barriers, first_tile, tile_step, first_column);
    }
    return;
  }
  claim_registers<232>();
  wait_for_earlier_kernels();
  stage_coefficients<kColumns>(problem, coefficients, first_column, thread - 128);  // there at multipliers_barrier
  const int group = warpgroup - 1, lane = thread % 32, warp_of_group = thread / 32 % 4;
  const bool stores = thread == 128;
  const PatchRows rows(problem, group, warp_of_group, lane);
  PatchRing ring;
  uint32_t residual_parity = 0;
  barrier_wait(filters_barrier(barriers), 0);
  for (int tile = first_tile; tile < plan.tiles; tile += tile_step) {
    const PatchOrigin origin(problem, tile);
    if (stores) {
      store_wait_read();  // the tile before has left `output`
      if (problem.has_residual) {
        barrier_arrive_expecting(residual_barrier(barriers), plan.output_pixels() * 128);
        copy_box_4d(output, problem.residual, residual_barrier(barriers), first_column, origin.w, origin.h, origin.n);
      }
    }
    PatchAccumulator<kColumns> acc;
    multiply_patches<T, kColumns>(problem, filters, patches, barriers, ring, group, lane, acc);
    multipliers_barrier();  // the storing thread has seen `output` free
    if (problem.has_residual) {
      barrier_wait(residual_barrier(barriers), residual_parity);
      residual_parity ^= 1;
      finish_patch<T, kColumns, true>(problem.relu, acc, output, coefficients, rows, lane);
    } else {
      finish_patch<T, kColumns, false>(problem.relu, acc, output, coefficients, rows, lane);
    }
    fence_async_proxy();
    multipliers_barrier();
    if (stores) {
      store_box_4d(problem.out, output, first_column, origin.w, origin.h, origin.n);
      store_commit();
    }
  }
  if (stores) store_wait();
#else
  __trap();  // not compiled for sm_90a: the dispatcher must not come here
#endif
}

namespace {

template <typename T, int kColumns>
void launch_patch(const char* name, const ConvProblem& problem, const LaunchTarget& target) {
  const DeviceFacts device = device_facts(target.device);
  const PatchConvolution convolution =
      patch_operands(problem, kTypeOf16Bits<T>, patch_plan(problem, kColumns, device), kColumns);
  const PatchPlan& plan = convolution.plan;
  const int64_t most = std::max<int64_t>(device.multiprocessors / plan.column_tiles, 1);
  const int64_t blocks = std::min<int64_t>(plan.tiles, most) * plan.column_tiles;
  launch_early<conv2d_patch<T, kColumns>>(name, target.device, dim3(static_cast<unsigned>(blocks)), 3 * 128,
                                          plan.shared_bytes(kColumns), target.stream, convolution);
}

}  // namespace

template <typename T>
void launch_conv2d_patch(const ConvProblem& problem, int tile_columns, const LaunchTarget& target) {
  if (tile_columns == 64) {
    launch_patch<T, 64>("conv2d patch 256x64", problem, target);
  } else {
    launch_patch<T, 32>("conv2d patch 256x32", problem, target);
  }
}

template void launch_conv2d_patch<__nv_bfloat16>(const ConvProblem&, int, const LaunchTarget&);
template void launch_conv2d_patch<__half>(const ConvProblem&, int, const LaunchTarget&);

}  // namespace fastcnn::cuda
