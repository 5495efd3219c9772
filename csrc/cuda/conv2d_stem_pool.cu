// A network's first convolution and the max pooling behind it in one kernel (sm_90a, bf16, fp16).
//
//   y[m, k] = act(sum_{r,s,c} input[n, h, w, c] * weight[k, r, s, c] * scale[k] + bias[k]), rounded to the dtype
//   out[n, p, q, k] = max of y over the 3x3 window of (p, q), stride 2, padding 0 or 1
//
// The convolution is conv2d_stem_wgmma.cu's, sum for sum, so that the result is the two kernels' to the bit.
// Work: a block keeps 64 filters and goes down an image in walks of some output rows (device/stem_pool_layout.h). A
//   warpgroup multiplies the same 64 columns in row after row; so maxima over rows are taken in its registers, where
//   the last row of a window waits as the first of the next. No row is computed twice but the first of a walk, and no
//   column but the first of a strip.
// Registers: accumulators (32), A from the band, the row that waits (16: pairs in the output's dtype).
// Shared memory: filters, tables and bands as in conv2d_stem_wgmma.cu; two staged rows, on whose way to memory maxima
//   over columns are taken: 16-byte vectors, whole lines. 98752 bytes for ResNet's stem, so that two blocks share a
//   multiprocessor and one multiplies while the other stores.
// Floor: operations of the convolution; input and pooled output once through DRAM (224x224, 7x7/2, 64 filters: 0.3 and
//   0.4 MB an image, where the convolution's output would be 1.6 written and 1.6 read).
#include <algorithm>

#include "conv2d_stem_plan.h"
#include "device/stem_band.cuh"
#include "device/stem_pool.cuh"
#include "device/wgmma.cuh"
#include "host.h"

namespace fastcnn::cuda {

template <typename T>
__global__ void __launch_bounds__(32 * kStemWgmmaWarps, kStemBlocks)
    conv2d_stem_pool(const __grid_constant__ ConvProblem problem, const __grid_constant__ StemPoolPlan pool) {
#if defined(FASTCNN_HAS_WGMMA)
  constexpr int kColumns = kStemPoolColumns;
  const StemPlan& plan = pool.stem;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int threads = 32 * plan.warps;
  const int first_filter = static_cast<int>(blockIdx.y) * kColumns;

  unsigned char* shared = dynamic_shared();
  shared += (1024 - shared_address(shared) % 1024) % 1024;
  uint32_t* weights = reinterpret_cast<uint32_t*>(shared);
  StemTap* taps = reinterpret_cast<StemTap*>(shared + plan.weight_bytes);
  float* scales = reinterpret_cast<float*>(taps + (plan.steps + 2) * 4);
  unsigned char* bands = reinterpret_cast<unsigned char*>(scales + 2 * kColumns);
  unsigned char* staged = bands + 2 * plan.band_bytes();

  const uint64_t filters = wgmma_descriptor(shared_address(weights));

  let_next_kernel_begin();
  wait_for_earlier_kernels();
  int index = static_cast<int>(blockIdx.x), tile = 0, buffer = 0, stage = 0;
  load_band<T>(problem, plan, stem_walk_tile(pool, stem_walk(pool, index), 0), bands, thread, threads);
  pack_weights<T, kColumns>(problem, plan, first_filter, weights, thread, threads,
                            [](int filter, int pair) { return stem_wgmma_word(kColumns, filter, pair); });
  fill_tables<kColumns>(problem, plan, first_filter, taps, scales, thread, threads);

  // This lane's two columns of the strip.
  const int column = warp * 16 + lane / 4 * plan.row_step;
  const int apart = 2 * plan.half_step * problem.shape.stride_w * plan.pixel;
  PooledRow<T> waiting;

  while (index < pool.walks) {
    copy_async_wait<0>();  // this tile's band has arrived for this thread,
    fence_async_proxy();   // the filters it wrote are there for wgmma,
    __syncthreads();       // for all threads; and all are done reading the other band
    const StemWalk walk = stem_walk(pool, index);
    const StemTile at = stem_walk_tile(pool, walk, tile);
    const int row = tile * plan.tile_h;  // of the walk
    const bool last = ++tile == plan.tiles;
    if (last) tile = 0, index += static_cast<int>(gridDim.x);
    if (index < pool.walks) {
      load_band<T>(problem, plan, stem_walk_tile(pool, stem_walk(pool, index), tile),
                   bands + (buffer ^ 1) * plan.band_bytes(), thread, threads);
    }

    // Where this lane's first window starts, in the tile's first row; the second one is `apart` bytes on.
    uint32_t window =
        static_cast<uint32_t>(buffer * plan.band_bytes()) + stem_column_window(plan, problem.shape, at, column);
    const uint32_t down = static_cast<uint32_t>(2 * problem.shape.stride_h * plan.band_row);
    buffer ^= 1;

    const int rows = smaller(plan.tile_h, 2 * walk.rows + 1 - row);
    for (int i = 0; i < rows; ++i) {
      const bool real = static_cast<uint32_t>(at.p + i) < static_cast<uint32_t>(plan.out_h);
      float acc[kColumns / 8][4] = {};
      if (real) {
        uint32_t a[2][4] = {};
        const StemTap* lane_taps = taps + lane % 4;
        StemTap tap[2] = {lane_taps[0], lane_taps[4]};
        const auto multiply = [&](uint32_t (&pairs)[4], StemTap& tap, const StemTap& after_next, uint64_t b) {
          const uint32_t first = window + tap.offset, second = window + tap.next_offset;
          pairs[0] = load_stem_pair(bands, first, tap.mask);
          pairs[1] = load_stem_pair(bands + apart, first, tap.mask);
          pairs[2] = load_stem_pair(bands, second, tap.next_mask);
          pairs[3] = load_stem_pair(bands + apart, second, tap.next_mask);
          tap = after_next;
          wgmma_fence();
          wgmma_registers<T, kColumns>(acc, pairs, b);
          wgmma_commit();
        };
        uint64_t b = filters;  // 32 bytes a step, and from one tile of four steps to the next
#pragma unroll 1
        for (int step = 0; step < plan.steps; step += 2) {  // the number of steps is even
          multiply(a[0], tap[0], lane_taps[8], b);
          wgmma_wait<1>();
          hold(a[1]);
          multiply(a[1], tap[1], lane_taps[12], b + 32 / 16);
          wgmma_wait<1>();
          hold(a[0]);
          lane_taps += 8;
          b += step % 4 == 0 ? 64 / 16 : (kColumns * 128 - 64) / 16;
        }
        wgmma_wait<0>();
        hold(a[1]);
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) hold(acc[j]);
      }
      window += down;

      // Rows of a walk: the first waits, then each pair ends a window, and its second row waits.
      const int in_walk = row + i;
      if (in_walk % 2 == 1) {
        if (real) waiting.add(acc, scales, lane);
        continue;
      }
      unsigned char* target = staged + stage * pool.staged_bytes();
      if (in_walk > 0) {
        waiting.finish(acc, scales, real, lane, target, column, plan.half_step);
        __syncthreads();  // the staged row is there; the other one may be written, which was read before
        store_pooled_row<T>(problem, pool, walk, in_walk / 2 - 1, target, first_filter, thread, threads);
        stage ^= 1;
      } else {
        waiting.start(acc, scales, real, lane);
      }
    }
  }
#else
  __trap();  // not compiled for sm_90a: the dispatcher must not come here
#endif
}

template <typename T>
void launch_conv2d_stem_pool(const ConvProblem& problem, const StemPoolPlan& plan, const LaunchTarget& target) {
  const dim3 grid(static_cast<unsigned>(std::min(plan.walks, plan.stem.most_blocks)),
                  static_cast<unsigned>(ceil_divide(problem.shape.filters, kStemPoolColumns)));
  launch_early<conv2d_stem_pool<T>>("conv2d stem pool", target.device, grid, 32 * plan.stem.warps, plan.shared_bytes(),
                                    target.stream, problem, plan);
}

template void launch_conv2d_stem_pool<__nv_bfloat16>(const ConvProblem&, const StemPoolPlan&, const LaunchTarget&);
template void launch_conv2d_stem_pool<__half>(const ConvProblem&, const StemPoolPlan&, const LaunchTarget&);

}  // namespace fastcnn::cuda
