// The first convolution of a network: one to four input channels, bf16 or fp16, on tensor cores through mma.sync.
//
//   out[m, k] = act(sum_{r,s,c} input[n, h, w, c] * weight[k, r, s, c] * scale[k] + bias[k] + residual[m, k])
//   m = output pixel (N*P*Q), k = filter; h = p*stride - pad + r, w = q*stride - pad + s
//
// A pixel of so few channels is no 16-byte vector, so im2col would be gathered element by element. But a window's part
//   of one filter row is S*C neighbouring elements of NHWC memory, and an mma.sync fragment of A is made of 32-bit
//   pairs: once the input rows lie in shared memory, fragments are read from them in place (device/stem_layout.h).
// Work: a block stays on its multiprocessor and walks over tiles of a few output rows by up to all columns of an image,
//   for 32, 64 or 96 filters. Its warps take 32 pixels by all these filters at a time: two products of 16 rows share
//   each fragment of weights, and a fragment of A serves 4, 8 or 12 products.
// Shared memory: the block's filters in fragment order, loaded once; two bands of input rows, the next tile's filled
//   (cp.async where image rows are aligned vectors) while this tile's is multiplied; scale and bias.
// Registers: accumulators (64 for 64 filters), one step of fragments. Two blocks share a multiprocessor, so that one
//   multiplies while the other stores. The accumulators leave as 16-byte vectors without passing shared memory.
// Floor: 2*N*P*Q*K*R*S*C operations (k padded to 16: 160 for 147 in a 7x7x3 filter); input and output once through
//   DRAM. At 224x224, 7x7/2, 64 filters, the output is 1.6 MB an image, the input 0.3 MB: memory bound.
#include <algorithm>

#include "conv2d_stem_plan.h"
#include "device/stem_band.cuh"
#include "device/stem_store.cuh"
#include "host.h"

namespace fastcnn::cuda {

template <typename T, int kColumns>
__global__ void __launch_bounds__(32 * stem_most_warps(kColumns), kStemBlocks)
    conv2d_stem(const __grid_constant__ ConvProblem problem, const __grid_constant__ StemPlan plan) {
  constexpr int kProducts = kColumns / 8;
  const ConvShape& shape = problem.shape;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int threads = 32 * plan.warps;
  const int first_filter = static_cast<int>(blockIdx.y) * kColumns;

  unsigned char* shared = dynamic_shared();
  uint32_t* weights = reinterpret_cast<uint32_t*>(shared);
  StemTap* taps = reinterpret_cast<StemTap*>(shared + plan.weight_bytes);
  float* scales = reinterpret_cast<float*>(taps + (plan.steps + 2) * 4);
  unsigned char* bands = reinterpret_cast<unsigned char*>(scales + 2 * kColumns);

  int tile = static_cast<int>(blockIdx.x), buffer = 0;
  load_band<T>(problem, plan, stem_tile(plan, tile), bands, thread, threads);
  pack_weights<T, kColumns>(problem, plan, first_filter, weights, thread, threads,
                            [](int filter, int pair) { return stem_weight_word(kColumns, filter, pair); });
  fill_tables<kColumns>(problem, plan, first_filter, taps, scales, thread, threads);

  for (; tile < plan.tiles; tile += static_cast<int>(gridDim.x), buffer ^= 1) {
    copy_async_wait<0>();  // this tile's band has arrived for this thread,
    __syncthreads();       // for all threads; and all are done reading the other one
    const int next = tile + static_cast<int>(gridDim.x);
    if (next < plan.tiles) {
      load_band<T>(problem, plan, stem_tile(plan, next), bands + (buffer ^ 1) * plan.band_bytes(), thread, threads);
    }

    const StemTile at = stem_tile(plan, tile);
    const uint32_t band = static_cast<uint32_t>(buffer * plan.band_bytes());
    const int pixels = stem_tile_rows(plan, at) * plan.tile_w;
    for (int chunk = warp; chunk * kStemChunk < pixels; chunk += plan.warps) {
      int32_t row[2][2];      // output pixels of this lane's rows of the products; -1: not there
      uint32_t window[2][2];  // where their windows start in the bands
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pixel = chunk * kStemChunk + 16 * i + half * plan.half_step + lane / 4 * plan.row_step;
          window[i][half] = band + stem_window(plan, shape, at, pixel, row[i][half]);
        }
      }

      float acc[2][kProducts][4] = {};
      const uint4* fragments = reinterpret_cast<const uint4*>(weights) + lane;
      const StemTap* lane_taps = taps + lane % 4;
      StemTap tap = lane_taps[0];
#pragma unroll 1
      for (int step = 0; step < plan.steps; ++step) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[i][0] = load_stem_pair(bands, window[i][0] + tap.offset, tap.mask);
          a[i][1] = load_stem_pair(bands, window[i][1] + tap.offset, tap.mask);
          a[i][2] = load_stem_pair(bands, window[i][0] + tap.next_offset, tap.next_mask);
          a[i][3] = load_stem_pair(bands, window[i][1] + tap.next_offset, tap.next_mask);
        }
        lane_taps += 4;
        tap = *lane_taps;
#pragma unroll
        for (int j = 0; j < kProducts; j += 2) {
          const uint4 b = *fragments;
          fragments += 32;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma_sync<T>(acc[i][j], a[i], b.x, b.y);
            mma_sync<T>(acc[i][j + 1], a[i], b.z, b.w);
          }
        }
      }
      store_stem<T, 2, kColumns>(problem, scales, acc, row, first_filter, lane);
    }
  }
}

template <typename T, int kColumns>
static void launch_stem(const StemPlan& plan, const ConvProblem& problem, const LaunchTarget& target) {
  const dim3 grid(static_cast<unsigned>(std::min(plan.tiles, plan.most_blocks)),
                  static_cast<unsigned>(ceil_divide(problem.shape.filters, kColumns)));
  launch<conv2d_stem<T, kColumns>>("conv2d stem", target.device, grid, 32 * plan.warps, plan.shared_bytes(),
                                   target.stream, problem, plan);
}

template <typename T>
void launch_conv2d_stem(const ConvProblem& problem, const LaunchTarget& target) {
  StemPlan plan;
  if (!make_stem_plan(plan, problem, device_facts(target.device), false))
    throw std::logic_error("fastcnn CUDA conv2d: not a case for the stem kernel");
  if (plan.columns == 32) return launch_stem<T, 32>(plan, problem, target);
  if (plan.columns == 64) return launch_stem<T, 64>(plan, problem, target);
  launch_stem<T, 96>(plan, problem, target);
}

template void launch_conv2d_stem<__nv_bfloat16>(const ConvProblem&, const LaunchTarget&);
template void launch_conv2d_stem<__half>(const ConvProblem&, const LaunchTarget&);

}  // namespace fastcnn::cuda
