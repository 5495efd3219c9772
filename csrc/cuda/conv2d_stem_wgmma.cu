// The stem convolution of conv2d_stem.cu on Hopper's warpgroup products (sm_90a), for more than 32 filters.
//
// The same bands, pairs, masks and order of filters (device/stem_layout.h). Work: a warpgroup takes 64 pixels by the
//   block's 64 or 96 filters; two warpgroups a block, two blocks a multiprocessor.
// Registers: A, read from the band as in conv2d_stem.cu, and accumulators (32 for 64 filters). Shared memory: as there,
//   but the filters are swizzled tiles that wgmma reads itself: no warp loads weights, and the tensor cores can run at
//   their full rate, of which mma.sync reaches about 60 %.
// Order: the pairs of step s + 1 are read while step s is multiplied, into the other of two sets of registers; before
//   they are overwritten, the product that reads them has been waited for.
// Floor: as in conv2d_stem.cu.
#include <algorithm>

#include "conv2d_stem_plan.h"
#include "device/stem_band.cuh"
#include "device/stem_store.cuh"
#include "device/wgmma.cuh"
#include "host.h"

namespace fastcnn::cuda {

template <typename T, int kColumns>
__global__ void __launch_bounds__(32 * kStemWgmmaWarps, kStemBlocks)
    conv2d_stem_wgmma(const __grid_constant__ ConvProblem problem, const __grid_constant__ StemPlan plan) {
#if defined(FASTCNN_HAS_WGMMA)
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int threads = 32 * plan.warps;
  const int first_filter = static_cast<int>(blockIdx.y) * kColumns;

  unsigned char* shared = dynamic_shared();
  shared += (1024 - shared_address(shared) % 1024) % 1024;
  uint32_t* weights = reinterpret_cast<uint32_t*>(shared);
  StemTap* taps = reinterpret_cast<StemTap*>(shared + plan.weight_bytes);
  float* scales = reinterpret_cast<float*>(taps + (plan.steps + 2) * 4);
  unsigned char* bands = reinterpret_cast<unsigned char*>(scales + 2 * kColumns);

  const uint64_t filters = wgmma_descriptor(shared_address(weights));

  let_next_kernel_begin();
  wait_for_earlier_kernels();
  int tile = static_cast<int>(blockIdx.x), buffer = 0;
  load_band<T>(problem, plan, stem_tile(plan, tile), bands, thread, threads);
  pack_weights<T, kColumns>(problem, plan, first_filter, weights, thread, threads,
                            [](int filter, int pair) { return stem_wgmma_word(kColumns, filter, pair); });
  fill_tables<kColumns>(problem, plan, first_filter, taps, scales, thread, threads);

  for (; tile < plan.tiles; tile += static_cast<int>(gridDim.x), buffer ^= 1) {
    copy_async_wait<0>();  // this tile's band has arrived for this thread,
    fence_async_proxy();   // the filters it wrote are there for wgmma,
    __syncthreads();       // for all threads; and all are done reading the other band
    const int next = tile + static_cast<int>(gridDim.x);
    if (next < plan.tiles) {
      load_band<T>(problem, plan, stem_tile(plan, next), bands + (buffer ^ 1) * plan.band_bytes(), thread, threads);
    }

    const StemTile at = stem_tile(plan, tile);
    const uint32_t band = static_cast<uint32_t>(buffer * plan.band_bytes());
    const int pixels = stem_tile_rows(plan, at) * plan.tile_w;
    for (int chunk = warp / 4; chunk * kStemWgmmaChunk < pixels; chunk += plan.warps / 4) {
      int32_t row[1][2];
      uint32_t window[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = chunk * kStemWgmmaChunk + warp % 4 * 16 + half * plan.half_step + lane / 4 * plan.row_step;
        window[half] = band + stem_window(plan, problem.shape, at, pixel, row[0][half]);
      }

      float acc[1][kColumns / 8][4] = {};
      uint32_t a[2][4] = {};
      const StemTap* lane_taps = taps + lane % 4;
      StemTap tap[2] = {lane_taps[0], lane_taps[4]};
      const auto multiply = [&](uint32_t (&pairs)[4], StemTap& tap, int step) {
        pairs[0] = load_stem_pair(bands, window[0] + tap.offset, tap.mask);
        pairs[1] = load_stem_pair(bands, window[1] + tap.offset, tap.mask);
        pairs[2] = load_stem_pair(bands, window[0] + tap.next_offset, tap.next_mask);
        pairs[3] = load_stem_pair(bands, window[1] + tap.next_offset, tap.next_mask);
        tap = lane_taps[4 * (step + 2)];
        wgmma_fence();
        wgmma_registers<T, kColumns>(acc[0], pairs, filters + (step / 4 * kColumns * 128 + step % 4 * 32) / 16);
        wgmma_commit();
      };
#pragma unroll 1
      for (int step = 0; step < plan.steps; step += 2) {  // the number of steps is even
        multiply(a[0], tap[0], step);
        wgmma_wait<1>();
        hold(a[1]);
        multiply(a[1], tap[1], step + 1);
        wgmma_wait<1>();
        hold(a[0]);
      }
      wgmma_wait<0>();
      hold(a[1]);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) hold(acc[0][j]);
      store_stem<T, 1, kColumns>(problem, scales, acc, row, first_filter, lane);
    }
  }
#else
  __trap();  // not compiled for sm_90a: the dispatcher must not come here
#endif
}

template <typename T, int kColumns>
static void launch_stem(const StemPlan& plan, const ConvProblem& problem, const LaunchTarget& target) {
  const dim3 grid(static_cast<unsigned>(std::min(plan.tiles, plan.most_blocks)),
                  static_cast<unsigned>(ceil_divide(problem.shape.filters, kColumns)));
  launch_early<conv2d_stem_wgmma<T, kColumns>>("conv2d stem wgmma", target.device, grid, 32 * plan.warps,
                                               plan.shared_bytes(), target.stream, problem, plan);
}

template <typename T>
void launch_conv2d_stem_wgmma(const ConvProblem& problem, const LaunchTarget& target) {
  StemPlan plan;
  if (!make_stem_plan(plan, problem, device_facts(target.device), true))
    throw std::logic_error("fastcnn CUDA conv2d: not a case for the stem kernel");
  if (plan.columns == 64) return launch_stem<T, 64>(plan, problem, target);
  launch_stem<T, 96>(plan, problem, target);
}

template void launch_conv2d_stem_wgmma<__nv_bfloat16>(const ConvProblem&, const LaunchTarget&);
template void launch_conv2d_stem_wgmma<__half>(const ConvProblem&, const LaunchTarget&);

}  // namespace fastcnn::cuda
