// The convolution of conv2d_patch.cu for 3x3 filters over up to 64 channels (of a group), with the filters held in
// registers.
//
//   out[n, p, q, k] = act(scale[k] * sum_{r, s, c} x[n, p + r - pad, q + s - pad, c] * w[k, r, s, c]
//                         + bias[k] + residual[n, p, q, k])
//
// With 64 filters as columns, a product of 64 pixels reads as many bytes of shared memory for the filters as for the
// pixels, and shared memory is the limit. Here the product is turned round: 64 filters are its rows, 128 pixels its
// columns. A thread holds its part of all 9 * 64 * 64 weights in 144 registers for good, and shared memory serves the
// pixels alone, at half its rate.
//
// Work: one block per multiprocessor and tile of 64 filters, walking over tiles of 256 rows of patches as in
//   conv2d_patch.cu. Two warpgroups take tiles in turns, each in two halves of 128 rows: while one finishes and stores,
//   the other multiplies. A third one copies.
// Shared memory: a ring of patches, whose last stage first holds the filters on their way into registers; an output
// tile
//   for each warpgroup, which ldmatrix and stmatrix transpose from and into pixels of 64 filters, and a place for what
//   the halo's columns give.
// Registers: filters (144), accumulators (64).
// Floor: reading the input once (times the halo) and writing the output; multiplying 256 rows for each tile.
#include <algorithm>

#include "conv2d_patch_operands.h"
#include "conv2d_problem.h"
#include "device/numeric.cuh"
#include "device/patch_tiles.cuh"
#include "device/ptx.cuh"
#include "device/tile_layout.h"
#include "device/tma.cuh"
#include "device/tma_epilogue.cuh"
#include "device/wgmma.cuh"
#include "host.h"

namespace fastcnn::cuda {

#if defined(FASTCNN_HAS_WGMMA)

namespace {

constexpr int kFilters = 64, kTaps = kHeldPatchTaps, kSteps = kTaps * 4;  // products of 16 channels
constexpr int kHalfRows = kPatchRows / 2;

// Where things lie in shared memory. Barriers: the filters' arrival, the end of their reading, each warpgroup's
// residual, then full and empty of each stage.
struct HeldLayout {
  uint32_t filters, patches, outputs, barriers, nowhere;
  __device__ __forceinline__ HeldLayout(const PatchPlan& plan, uint32_t start)
      : filters(start),
        patches(start + plan.first_bytes()),
        outputs(patches + (plan.stages - 1) * plan.patch_bytes()),
        barriers(outputs + 2 * plan.output_bytes()),
        nowhere(barriers + kHeldPatchBarrierBytes) {}
  __device__ __forceinline__ uint32_t filters_landed() const { return barriers; }
  __device__ __forceinline__ uint32_t filters_read() const { return barriers + 8; }
  __device__ __forceinline__ uint32_t residual(int group) const { return barriers + 16 + group * 8; }
  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 32 + stage * 16; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 40 + stage * 16; }
  __device__ __forceinline__ uint32_t patch(const PatchPlan& plan, int stage) const {
    return stage == plan.stages - 1 ? filters : patches + stage * plan.patch_bytes();
  }
};

__device__ __forceinline__ void copy_held_patches(const PatchConvolution& problem, const HeldLayout& at, int first_tile,
                                                  int tile_step, int first_column) {
  const PatchPlan& plan = problem.plan;
  barrier_arrive_expecting(at.filters_landed(), kTaps * kFilters * 128);
  for (int tap = 0; tap < kTaps; ++tap) {
    copy_box_3d(at.filters + tap * kFilters * 128, problem.weight, at.filters_landed(), 0, tap, first_column);
  }
  wait_for_earlier_kernels();
  const int channel = problem.by_group_filters.quotient(first_column) * problem.channels;
  PatchRing ring;
  for (int tile = first_tile; tile < plan.tiles; tile += tile_step) {
    const PatchOrigin origin(problem, tile);
    barrier_wait(at.empty(ring.stage), ring.parity ^ 1);
    if (ring.stage == plan.stages - 1 && ring.parity == 0) barrier_wait(at.filters_read(), 0);
    barrier_arrive_expecting(at.full(ring.stage), plan.patch_pixels() * 128);
    copy_box_4d(at.patch(plan, ring.stage), problem.input, at.full(ring.stage), channel, origin.w - problem.pad_left,
                origin.h - problem.pad_top, origin.n);
    ring.advance(plan.stages);
  }
}

using HeldFilters = uint32_t[kSteps][4];
using HeldAccumulator = float[kHalfRows / 8][4];

__device__ __forceinline__ void load_filters(HeldFilters& held, const HeldLayout& at, int warp_of_group, int lane) {
  barrier_wait(at.filters_landed(), 0);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t tap = at.filters + step / 4 * kFilters * 128;
    load_matrix_x4(held[step],
                   tap + tile_offset<128>(warp_of_group * 16 + a_lane_row(lane), step % 4 * 2 + a_lane_chunk(lane)));
  }
  __syncwarp();
  if (lane == 0) barrier_arrive(at.filters_read());
}

// acc = the filters by the 128 rows of the patch from `rows` on.
template <typename T>
__device__ __forceinline__ void multiply_half(const HeldFilters& held, uint32_t rows, int patch_w,
                                              HeldAccumulator& acc) {
#pragma unroll
  for (int atom = 0; atom < kHalfRows / 8; ++atom) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[atom][i] = 0.0f;
  }
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int tap = step / 4;
    const uint32_t pixels = rows + (tap / 3 * patch_w + tap % 3) * 128 + step % 4 * 32;
    wgmma_registers<T, kHalfRows>(acc, held[step], wgmma_descriptor(pixels));
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int atom = 0; atom < kHalfRows / 8; ++atom) hold(acc[atom]);
}

// Where row `at` of the patch lies in the output tile; -1 for halo.
__device__ __forceinline__ int output_row(const PatchConvolution& problem, int at) {
  const PatchPlan& plan = problem.plan;
  int32_t inside, w;
  const int32_t image = problem.by_patch_image.divide(at, inside);
  const int32_t h = problem.by_patch_w.divide(inside, w);
  const bool real = image < plan.tile_n && h < plan.tile_h && w < plan.tile_w;
  return real ? (image * plan.tile_h + h) * plan.tile_w + w : -1;
}

// A thread has pairs of neighbouring pixels of the filters lane / 4 and 8 further of its warp's 16.
template <typename T, bool kResidual>
__device__ __forceinline__ void finish_half(const PatchConvolution& problem, const HeldAccumulator& acc,
                                            uint32_t output, uint32_t nowhere, const float (&scale)[2],
                                            const float (&bias)[2], int first_row, int warp_of_group, int lane) {
  // Of the four 8x8 matrices that move at once, the lane says where a row of this one lies.
  const int matrix = lane / 8, row_of_matrix = lane % 8;
#pragma unroll
  for (int atom = 0; atom < kHalfRows / 8; atom += 2) {
    const int row = output_row(problem, first_row + (atom + matrix / 2) * 8 + row_of_matrix);
    const uint32_t to = row < 0 ? nowhere : output + tile_offset<128>(row, warp_of_group * 2 + matrix % 2);
    uint32_t residual[4], result[4];
    if constexpr (kResidual) load_matrix_transposed_x4(residual, to);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* values = &acc[atom + i / 2][i % 2 * 2];
      float x = values[0] * scale[i % 2] + bias[i % 2], y = values[1] * scale[i % 2] + bias[i % 2];
      if constexpr (kResidual) {
        const float2 added = unpack(residual[i], T());
        x += added.x;
        y += added.y;
      }
      result[i] = pack<T>(problem.relu ? relu(x) : x, problem.relu ? relu(y) : y);
    }
    store_matrix_transposed_x4(to, result);
  }
}

template <typename T>
__device__ __forceinline__ void compute_held_tiles(const PatchConvolution& problem, const HeldLayout& at, int tile,
                                                   int tile_step, int first_column, int group, int thread) {
  const PatchPlan& plan = problem.plan;
  const int lane = thread % 32, warp_of_group = thread / 32;
  HeldFilters held;
  load_filters(held, at, warp_of_group, lane);
  float scale[2], bias[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int filter = first_column + warp_of_group * 16 + lane / 4 + i * 8;
    const bool real = filter < problem.filters;
    scale[i] = real && problem.scale != nullptr ? problem.scale[filter] : 1.0f;
    bias[i] = real && problem.bias != nullptr ? problem.bias[filter] : 0.0f;
  }
  const uint32_t output = at.outputs + group * plan.output_bytes();
  PatchRing ring;
  if (group == 1) {
    tile += tile_step;
    ring.advance(plan.stages);
  }
  uint32_t residual_parity = 0;
  for (; tile < plan.tiles; tile += 2 * tile_step) {
    const PatchOrigin origin(problem, tile);
    if (thread == 0) {
      store_wait_read();  // the tile before has left `output`
      if (problem.has_residual) {
        barrier_arrive_expecting(at.residual(group), plan.output_pixels() * 128);
        copy_box_4d(output, problem.residual, at.residual(group), first_column, origin.w, origin.h, origin.n);
      }
    }
    barrier_wait(at.full(ring.stage), ring.parity);
    const uint32_t patch = at.patch(plan, ring.stage);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      HeldAccumulator acc;
      multiply_half<T>(held, patch + half * kHalfRows * 128, plan.patch_w, acc);
      if (half == 0) {
        warpgroup_barrier(group);  // thread 0 has seen `output` free
        if (problem.has_residual) barrier_wait(at.residual(group), residual_parity);
      } else if (lane == 0) {
        barrier_arrive(at.empty(ring.stage));
      }
      if (problem.has_residual) {
        finish_half<T, true>(problem, acc, output, at.nowhere, scale, bias, half * kHalfRows, warp_of_group, lane);
      } else {
        finish_half<T, false>(problem, acc, output, at.nowhere, scale, bias, half * kHalfRows, warp_of_group, lane);
      }
    }
    residual_parity ^= 1;
    ring.advance(plan.stages);  // the other warpgroup's
    ring.advance(plan.stages);
    fence_async_proxy();
    warpgroup_barrier(group);
    if (thread == 0) {
      store_box_4d(problem.out, output, first_column, origin.w, origin.h, origin.n);
      store_commit();
    }
  }
  if (thread == 0) store_wait();
}

}  // namespace

#endif

template <typename T>
__global__ void __launch_bounds__(3 * 128, 1) conv2d_patch_held(const __grid_constant__ PatchConvolution problem) {
#if defined(FASTCNN_HAS_WGMMA)
  const PatchPlan& plan = problem.plan;
  const int thread = static_cast<int>(threadIdx.x), warpgroup = uniform(thread / 128);
  int32_t column_tile;
  const int first_tile = problem.by_column_tiles.divide(static_cast<int32_t>(blockIdx.x), column_tile);
  const int tile_step = static_cast<int>(gridDim.x) / plan.column_tiles;
  const int first_column = column_tile * kFilters;

  const uint32_t shared = shared_address(dynamic_shared());
  const HeldLayout at(plan, shared + (1024 - shared % 1024) % 1024);
  if (thread == 0) {
    prefetch_tensor_map(problem.input);
    prefetch_tensor_map(problem.weight);
    prefetch_tensor_map(problem.out);
    barrier_init(at.filters_landed(), 1);
    barrier_init(at.filters_read(), 8);  // warps that multiply
    barrier_init(at.residual(0), 1);
    barrier_init(at.residual(1), 1);
    for (int stage = 0; stage < plan.stages; ++stage) {
      barrier_init(at.full(stage), 1);
      barrier_init(at.empty(stage), 4);  // warps of the warpgroup whose turn it is
    }
    barrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_begin();

  if (warpgroup == 0) {
    release_registers<24>();
    if (thread == 0) copy_held_patches(problem, at, first_tile, tile_step, first_column);
  } else {
    claim_registers<240>();
    wait_for_earlier_kernels();
    compute_held_tiles<T>(problem, at, first_tile, tile_step, first_column, warpgroup - 1, thread - warpgroup * 128);
  }
#else
  __trap();  // not compiled for sm_90a: the dispatcher must not come here
#endif
}

template <typename T>
void launch_conv2d_patch_held(const ConvProblem& problem, const LaunchTarget& target) {
  const DeviceFacts device = device_facts(target.device);
  const PatchConvolution convolution = patch_operands(
      problem, kTypeOf16Bits<T>, patch_plan(problem, kHeldPatchColumns, device, true), kHeldPatchColumns);
  const PatchPlan& plan = convolution.plan;
  const int64_t most = std::max<int64_t>(device.multiprocessors / plan.column_tiles, 1);
  const int64_t blocks = std::min<int64_t>(plan.tiles, most) * plan.column_tiles;
  launch_early<conv2d_patch_held<T>>("conv2d patch held", target.device, dim3(static_cast<unsigned>(blocks)), 3 * 128,
                                     plan.shared_bytes(kHeldPatchColumns), target.stream, convolution);
}

template void launch_conv2d_patch_held<__nv_bfloat16>(const ConvProblem&, const LaunchTarget&);
template void launch_conv2d_patch_held<__half>(const ConvProblem&, const LaunchTarget&);

}  // namespace fastcnn::cuda
