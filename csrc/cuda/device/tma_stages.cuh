// Stages of operands between the copy engine and wgmma: their layout, barriers, copies and products. Shared by
// conv2d_tma.cu and conv2d_tma_split.cu.
//
// The reduction runs over filter taps and blocks of their channels. A stage holds A (pixels x channels) and B (filters
// x channels):
//   kBlock = 64   one block of 64 channels, as rows of 128 bytes in the 128B swizzle
//   kBlock = 32   two blocks of 32, which may belong to neighbouring taps, each as rows of 64 bytes in the 64B swizzle
//   kBlock = 96   one block of 96: 64 channels as above, then 32, the rows of both behind each other
#pragma once

#include "../conv2d_tma_operands.h"
#include "numeric.cuh"
#include "ptx.cuh"
#include "tile_layout.h"
#include "tma.cuh"
#include "wgmma.cuh"

namespace fastcnn::cuda {

constexpr int kTmaBarrierBytes = 256;
constexpr int kMostPrologueChannels = 2560;  // whose factors find room in shared memory, behind the barriers

template <typename T, int kGroupRows_, int kColumns_, bool kInTurns_, int kStages_, bool kPrologue_ = false,
          int kBlock_ = kTensorMapRow>
struct TmaTile {
  using Type = T;
  static constexpr int kGroupRows = kGroupRows_, kColumns = kColumns_, kStages = kStages_;
  static constexpr bool kInTurns = kInTurns_, kPrologue = kPrologue_;
  static constexpr int kBlock = kBlock_, kBlocksOfStage = kBlock == kTensorMapHalfRow ? 2 : 1;
  static constexpr int kChannels = kBlock * kBlocksOfStage, kSteps = kChannels / 16;  // of a stage
  static constexpr int kRows = kInTurns ? kGroupRows : 2 * kGroupRows;
  static constexpr int kThreads = 3 * 128;
  static constexpr int kAtoms = kColumns / 8;  // of 8 columns in an accumulator
  static constexpr int kBytesA = kRows * kChannels * 2, kBytesB = kColumns * kChannels * 2;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kOutputBytes = kGroupRows * (kColumns < 64 ? 64 : kColumns) * 2;  // of a warpgroup
  static constexpr int kSharedBytes =
      kStages * kStageBytes + 2 * kOutputBytes + 2 * kColumns * 8 + 1024 + kTmaBarrierBytes;
  static_assert(kSharedBytes + (kPrologue ? kMostPrologueChannels * 8 : 0) <= 227 * 1024,
                "one block must fit a multiprocessor");
};

// Of shared memory, beyond what every problem needs.
template <typename Tile>
int prologue_bytes(const TmaOperands& problem) {
  return Tile::kPrologue ? problem.channel_blocks * kTensorMapRow * 8 : 0;
}

// Where the block's barriers are.
template <typename Tile>
struct TmaBarriers {
  uint32_t first;
  __device__ __forceinline__ uint32_t full(int stage) const { return first + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return first + (Tile::kStages + stage) * 8; }
  __device__ __forceinline__ uint32_t residual(int group) const { return first + (2 * Tile::kStages + group) * 8; }
  __device__ __forceinline__ uint32_t turn(int group) const { return first + (2 * Tile::kStages + 2 + group) * 8; }
};

// A position in the ring of stages, and the parity of its round.
template <int kStages>
struct StageRing {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void advance(int count) {
    const int total = stage + count;
    parity ^= (total / kStages) & 1;
    stage = total % kStages;
  }
};

#if defined(FASTCNN_HAS_WGMMA)

// The input pixel under a tile's first output pixel, and the tile's first filter.
struct TileOrigin {
  int w, h, n, channel, filter;
  template <typename Tile>
  __device__ __forceinline__ static TileOrigin of(const TmaOperands& problem, int tile) {
    int32_t column_tile, pixel, q;
    const int32_t row_tile = problem.by_column_tiles.divide(tile, column_tile);
    const int32_t n = problem.by_image.divide(row_tile * Tile::kRows, pixel);
    const int32_t p = problem.by_row.divide(pixel, q);
    return {q * problem.stride_w - problem.pad_left, p * problem.stride_h - problem.pad_top, n,
            problem.by_group_filters.quotient(column_tile * Tile::kColumns) * problem.channels,
            column_tile * Tile::kColumns};
  }
};

// Filters do not depend on earlier kernels: those of a block's first stages are on their way while these still run.
// Returns how many stages have theirs.
template <typename Tile>
__device__ __forceinline__ int copy_first_filters(const TmaOperands& problem, uint32_t stages,
                                                  const TmaBarriers<Tile>& barriers, int filter, int first, int last) {
  if constexpr (Tile::kBlock != kTensorMapRow) {
    return 0;
  } else {
    const int count = last - first < Tile::kStages ? last - first : Tile::kStages;
    int tap = first / problem.channel_blocks, block = first - tap * problem.channel_blocks;
    for (int stage = 0; stage < count; ++stage) {
      const uint32_t to = stages + stage * Tile::kStageBytes + Tile::kBytesA, full = barriers.full(stage);
      barrier_arrive_expecting(full, Tile::kStageBytes);
      copy_box_3d(to, problem.weight, full, block * kTensorMapRow, tap, filter);
      if (++block < problem.channel_blocks) continue;
      block = 0;
      ++tap;
    }
    return count;
  }
}

// Brings the blocks [first, last) of a tile's reduction, one thread. The first `with_filters` stages have their
// filters.
template <typename Tile>
__device__ __forceinline__ void copy_blocks(const TmaOperands& problem, uint32_t stages,
                                            const TmaBarriers<Tile>& barriers, StageRing<Tile::kStages>& ring,
                                            const TileOrigin& origin, int first, int last, int with_filters = 0) {
  constexpr int kPart = Tile::kBlocksOfStage;
  int tap = first / problem.channel_blocks, block = first - tap * problem.channel_blocks;
  int r = tap / problem.filter_w, s = tap - r * problem.filter_w;
  for (int at = first; at < last; at += kPart) {
    const uint32_t to = stages + ring.stage * Tile::kStageBytes, full = barriers.full(ring.stage);
    const int here = last - at < kPart ? last - at : kPart;
    const bool has_filters = with_filters-- > 0;
    if (!has_filters) barrier_wait(barriers.empty(ring.stage), ring.parity ^ 1);
    // A block of 96: the channels behind the first 64, where it has them.
    const int rest = block * Tile::kBlock + kTensorMapRow;
    const bool narrow = Tile::kBlock == kTensorMapWideBlock && rest >= problem.channels;
    if (!has_filters) {
      barrier_arrive_expecting(full,
                               narrow ? (Tile::kRows + Tile::kColumns) * 128 : here * (Tile::kStageBytes / kPart));
    }
    if constexpr (Tile::kBlock == kTensorMapWideBlock) {
      if (!narrow) {
        copy_pixels(to + Tile::kRows * 128, problem.input_rest, full, origin.channel + rest, origin.w, origin.h,
                    origin.n, s * problem.dilation_w, r * problem.dilation_h);
        copy_box_3d(to + Tile::kBytesA + Tile::kColumns * 128, problem.weight_rest, full, rest, tap, origin.filter);
      }
    }
    for (int part = 0; part < here; ++part) {
      copy_pixels(to + part * (Tile::kBytesA / kPart), problem.input, full, origin.channel + block * Tile::kBlock,
                  origin.w, origin.h, origin.n, s * problem.dilation_w, r * problem.dilation_h);
      if (!has_filters) {
        copy_box_3d(to + Tile::kBytesA + part * (Tile::kBytesB / kPart), problem.weight, full, block * Tile::kBlock,
                    tap, origin.filter);
      }
      if (++block < problem.channel_blocks) continue;
      block = 0;
      ++tap;
      if (++s < problem.filter_w) continue;
      s = 0;
      ++r;
    }
    ring.advance();
  }
}

template <typename Tile>
using TmaAccumulator = float[Tile::kGroupRows / 64][Tile::kColumns / 2];

// 16 channels, of rows of kRowBytes.
template <typename Tile, int kRowBytes>
__device__ __forceinline__ void multiply_rows(TmaAccumulator<Tile>& acc, uint32_t a, uint32_t b) {
#pragma unroll
  for (int half = 0; half < Tile::kGroupRows / 64; ++half) {
    wgmma<typename Tile::Type, Tile::kColumns>(acc[half], wgmma_descriptor<kRowBytes>(a + half * 64 * kRowBytes),
                                               wgmma_descriptor<kRowBytes>(b));
  }
}

// The same where `step` counts through the stage's channels, from its row `row` on.
template <typename Tile>
__device__ __forceinline__ void multiply_step(TmaAccumulator<Tile>& acc, uint32_t tile_a, uint32_t tile_b, int row,
                                              int step) {
  if constexpr (Tile::kBlock == kTensorMapHalfRow) {
    const int part = step / 2, inside = step % 2;
    multiply_rows<Tile, 64>(acc, tile_a + (part * Tile::kRows + row) * 64 + inside * 32,
                            tile_b + part * Tile::kColumns * 64 + inside * 32);
  } else if (Tile::kBlock == kTensorMapRow || step < 4) {
    multiply_rows<Tile, 128>(acc, tile_a + row * 128 + step * 32, tile_b + step * 32);
  } else {
    multiply_rows<Tile, 64>(acc, tile_a + Tile::kRows * 128 + row * 64 + (step - 4) * 32,
                            tile_b + Tile::kColumns * 128 + (step - 4) * 32);
  }
}

// The prologue's factors of all channels in shared memory: scales, then shifts, up to a whole block. Fetched one block
// after the other when they were wanted, they made a stage as long as a round trip to memory.
struct PrologueFactors {
  uint32_t address;
  int channels;  // up to a whole block
  __device__ __forceinline__ PrologueFactors(const TmaOperands& problem, uint32_t factors)
      : address(factors), channels(problem.channel_blocks * kTensorMapRow) {}
  // By all threads that multiply. Beyond the channels the filters are zero, and 0 * 1 + 0 must stay 0.
  __device__ __forceinline__ void fill(const TmaOperands& problem, int multiplier) const {
    for (int channel = multiplier; channel < channels; channel += 256) {
      const bool real = channel < problem.channels;
      put(channel, real && problem.input_scale != nullptr ? problem.input_scale[channel] : 1.0f);
      put(channels + channel, real && problem.input_shift != nullptr ? problem.input_shift[channel] : 0.0f);
    }
    multipliers_barrier();
  }
  __device__ __forceinline__ void read(float (&scale)[8], float (&shift)[8], int channel) const {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const uint4 scales = load_shared_16(address + (channel + i) * 4);
      const uint4 shifts = load_shared_16(address + (channels + channel + i) * 4);
      memcpy(scale + i, &scales, 16);
      memcpy(shift + i, &shifts, 16);
    }
  }

 private:
  __device__ __forceinline__ void put(int index, float value) const {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    store_shared_4(address + index * 4, bits);
  }
};

// Applies the prologue to this warpgroup's rows of a stage: a thread to one 16-byte chunk of every 16th row.
template <typename Tile>
__device__ __forceinline__ void apply_prologue_in_place(const PrologueFactors& factors, bool relu_input, int channel,
                                                        uint32_t tile_a, int group, int thread) {
  using T = typename Tile::Type;
  constexpr int kWidth = kVector<T>, kRowsOfThread = Tile::kGroupRows / 16;
  float scale[kWidth], shift[kWidth];
  factors.read(scale, shift, channel);
  uint4 raw[kRowsOfThread];
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    raw[i] = load_shared_16(tile_a + tile_offset<128>(thread / 8 + i * 16, thread % 8));
  }
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    T values[kWidth];
    memcpy(values, &raw[i], 16);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float x = to_float(values[j]) * scale[j] + shift[j];
      values[j] = from_float<T>(relu_input ? relu(x) : x);
    }
    memcpy(&raw[i], values, 16);
    store_shared_16(tile_a + tile_offset<128>(thread / 8 + i * 16, thread % 8), raw[i]);
  }
  fence_async_proxy();
  warpgroup_barrier(group);
}

// What a warpgroup keeps from one stage to the next.
struct StageState {
  PrologueFactors factors;
  int before = -1;  // the stage whose products are still running
};

// One stage: `steps` products of 16 channels, kSteps where it is whole. The thread's part of a prologue begins at
// `channel`.
template <typename Tile>
__device__ __forceinline__ void multiply_stage(const TmaOperands& problem, uint32_t stages,
                                               const TmaBarriers<Tile>& barriers, StageRing<Tile::kStages>& ring,
                                               int group, int thread, bool whole, int steps, int channel,
                                               StageState& state, TmaAccumulator<Tile>& acc) {
  const int lane = thread % 32, rows_of_group = Tile::kInTurns ? 0 : group * Tile::kGroupRows;
  const uint32_t tile_a = stages + ring.stage * Tile::kStageBytes;
  const uint32_t tile_b = stages + ring.stage * Tile::kStageBytes + Tile::kBytesA;
  barrier_wait(barriers.full(ring.stage), ring.parity);
  if constexpr (Tile::kPrologue) {
    apply_prologue_in_place<Tile>(state.factors, problem.input_relu, channel, tile_a + rows_of_group * 128, group,
                                  thread);
  }
  wgmma_fence();
  if (whole) {
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) multiply_step<Tile>(acc, tile_a, tile_b, rows_of_group, step);
    wgmma_commit();
  } else {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) multiply_step<Tile>(acc, tile_a, tile_b, rows_of_group, step);
    wgmma_commit();
  }
  wgmma_wait<1>();
  if (state.before >= 0 && lane == 0) barrier_arrive(barriers.empty(state.before));
  state.before = ring.stage;
  ring.advance();
}

template <typename Tile>
__device__ __forceinline__ void clear(TmaAccumulator<Tile>& acc) {
#pragma unroll
  for (int half = 0; half < Tile::kGroupRows / 64; ++half) {
#pragma unroll
    for (int i = 0; i < Tile::kColumns / 2; ++i) acc[half][i] = 0.0f;
  }
}

// acc = the product of the blocks [first, last) of a tile's reduction, one or more, but for the wait for the last
// stage.
template <typename Tile>
__device__ __forceinline__ void multiply_blocks(const TmaOperands& problem, uint32_t stages,
                                                const TmaBarriers<Tile>& barriers, StageRing<Tile::kStages>& ring,
                                                int group, int thread, int first, int last, StageState& state,
                                                TmaAccumulator<Tile>& acc) {
  clear<Tile>(acc);
  int block = first % problem.channel_blocks;
  int at = first;
  do {  // no way past the loop: it would define acc beside wgmma, and ptxas would wait for each product in turn
    bool whole = at + 1 < last;
    int steps = 2;
    if constexpr (Tile::kBlocksOfStage == 1) {
      whole = block + 1 < problem.channel_blocks || problem.last_steps == Tile::kSteps;
      steps = problem.last_steps;
    }
    multiply_stage<Tile>(problem, stages, barriers, ring, group, thread, whole, steps,
                         block * kTensorMapRow + thread % 8 * 8, state, acc);
    if (++block == problem.channel_blocks) block = 0;
    at += Tile::kBlocksOfStage;
  } while (at < last);
}

// The products of the last stage are done, and acc may be read.
template <typename Tile>
__device__ __forceinline__ void end_products(const TmaBarriers<Tile>& barriers, const StageState& state, int lane,
                                             TmaAccumulator<Tile>& acc) {
  wgmma_wait<0>();
#pragma unroll
  for (int half = 0; half < Tile::kGroupRows / 64; ++half) hold(acc[half]);
  if (lane == 0) barrier_arrive(barriers.empty(state.before));
}

#endif

}  // namespace fastcnn::cuda
