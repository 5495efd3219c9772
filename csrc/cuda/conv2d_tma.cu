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
// Copies: the reduction runs over filter taps and blocks of 64 channels; a stage holds A (pixels x 64) and B (filters x
//   64) as rows of 128 bytes in the 128B swizzle. The copy engine computes every address, fills padding with zeros and
//   reports to the stage's `full` barrier; warps report to `empty` when a stage has been multiplied.
// With a prologue (1x1 filters without padding): the warpgroup applies it in place to its rows of A when a stage has
//   landed, while the tensor cores still work on the stage before.
// Shared memory: the stages, and for each warpgroup its part of the output, into which the copy engine brings the
//   residual during the multiplication and from which it stores the result: no thread computes an output address.
// Registers: accumulators only; operands go from shared memory to the tensor cores.
// Floor: as in conv2d_mma.cuh.
#include <algorithm>

#include "conv2d_problem.h"
#include "conv2d_views.h"
#include "device/numeric.cuh"
#include "device/ptx.cuh"
#include "device/tile_layout.h"
#include "device/tma.cuh"
#include "device/tma_epilogue.cuh"
#include "device/wgmma.cuh"
#include "host.h"
#include "tensor_map.h"

namespace fastcnn::cuda {

struct TmaConvolution {
  TensorMap input, weight, residual, out;
  FastDivisor by_column_tiles, by_image, by_row;
  int32_t tiles;
  int32_t filter_h, filter_w, channel_blocks;
  int32_t last_steps;  // products of 16 channels in a tap's last block
  int32_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int32_t filters;               // of all groups
  FastDivisor by_group_filters;  // column -> group
  int32_t channels;              // of a group
  const float* scale;
  const float* bias;
  const float* input_scale;
  const float* input_shift;
  bool has_residual, relu, input_relu;
};

template <typename T, int kGroupRows_, int kColumns_, bool kInTurns_, int kStages_, bool kPrologue_ = false>
struct TmaTile {
  using Type = T;
  static constexpr int kGroupRows = kGroupRows_, kColumns = kColumns_, kStages = kStages_;
  static constexpr bool kInTurns = kInTurns_, kPrologue = kPrologue_;
  static constexpr int kRows = kInTurns ? kGroupRows : 2 * kGroupRows;
  static constexpr int kThreads = 3 * 128;
  static constexpr int kAtoms = kColumns / 8;  // of 8 columns in an accumulator
  static constexpr int kBytesA = kRows * 128, kBytesB = kColumns * 128, kStageBytes = kBytesA + kBytesB;
  static constexpr int kOutputBytes = kGroupRows * (kColumns < 64 ? 64 : kColumns) * 2;  // of a warpgroup
  static constexpr int kSharedBytes = kStages * kStageBytes + 2 * kOutputBytes + 2 * kColumns * 8 + 1024 + 256;
  static_assert(kSharedBytes <= 227 * 1024, "one block must fit a multiprocessor");
};

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

// One thread feeds the block.
template <typename Tile>
__device__ __forceinline__ void copy_tiles(const TmaConvolution& problem, uint32_t stages,
                                           const TmaBarriers<Tile>& barriers) {
  StageRing<Tile::kStages> ring;
  for (int tile = static_cast<int>(blockIdx.x); tile < problem.tiles; tile += static_cast<int>(gridDim.x)) {
    int32_t column_tile, pixel, q;
    const int32_t row_tile = problem.by_column_tiles.divide(tile, column_tile);
    const int32_t n = problem.by_image.divide(row_tile * Tile::kRows, pixel);
    const int32_t p = problem.by_row.divide(pixel, q);
    const int h = p * problem.stride_h - problem.pad_top, w = q * problem.stride_w - problem.pad_left;
    const int first_channel = problem.by_group_filters.quotient(column_tile * Tile::kColumns) * problem.channels;
    int tap = 0;
    for (int r = 0; r < problem.filter_h; ++r) {
      for (int s = 0; s < problem.filter_w; ++s, ++tap) {
        for (int block = 0; block < problem.channel_blocks; ++block) {
          const uint32_t to = stages + ring.stage * Tile::kStageBytes, full = barriers.full(ring.stage);
          barrier_wait(barriers.empty(ring.stage), ring.parity ^ 1);
          barrier_arrive_expecting(full, Tile::kStageBytes);
          copy_pixels(to, problem.input, full, first_channel + block * kTensorMapRow, w, h, n, s * problem.dilation_w,
                      r * problem.dilation_h);
          copy_box_3d(to + Tile::kBytesA, problem.weight, full, block * kTensorMapRow, tap,
                      column_tile * Tile::kColumns);
          ring.advance();
        }
      }
    }
  }
}

template <typename Tile>
using TmaAccumulator = float[Tile::kGroupRows / 64][Tile::kColumns / 2];

template <typename Tile>
__device__ __forceinline__ void multiply_step(TmaAccumulator<Tile>& acc, uint32_t tile_a, uint32_t tile_b, int step) {
#pragma unroll
  for (int half = 0; half < Tile::kGroupRows / 64; ++half) {
    wgmma<typename Tile::Type, Tile::kColumns>(acc[half], wgmma_descriptor(tile_a + half * 64 * 128 + step * 32),
                                               wgmma_descriptor(tile_b + step * 32));
  }
}

// The prologue's factors of a thread's 8 channels of a block. They are loaded a block ahead, to be there in time.
struct PrologueFactors {
  float scale[8], shift[8];
  __device__ __forceinline__ void load(const TmaConvolution& problem, int channel) {
    load_factors(scale, problem.input_scale, problem.channels, channel, 1.0f);
    load_factors(shift, problem.input_shift, problem.channels, channel, 0.0f);
  }

 private:
  // Beyond the channels the filters are zero, and 0 * 1 + 0 must stay 0.
  __device__ __forceinline__ static void load_factors(float (&to)[8], const float* from, int channels, int channel,
                                                      float otherwise) {
    if (from != nullptr && channel + 8 <= channels && reinterpret_cast<uint64_t>(from) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(from + channel + i));
        to[i] = four.x;
        to[i + 1] = four.y;
        to[i + 2] = four.z;
        to[i + 3] = four.w;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      to[i] = from != nullptr && channel + i < channels ? __ldg(from + channel + i) : otherwise;
    }
  }
};

// Applies the prologue to this warpgroup's rows of a stage: a thread to one 16-byte chunk of every 16th row.
template <typename Tile>
__device__ __forceinline__ void apply_prologue_in_place(const PrologueFactors& factors, bool relu_input,
                                                        uint32_t tile_a, int group, int thread) {
  using T = typename Tile::Type;
  constexpr int kWidth = kVector<T>, kRowsOfThread = Tile::kGroupRows / 16;
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
      const float x = to_float(values[j]) * factors.scale[j] + factors.shift[j];
      values[j] = from_float<T>(relu_input ? relu(x) : x);
    }
    memcpy(&raw[i], values, 16);
    store_shared_16(tile_a + tile_offset<128>(thread / 8 + i * 16, thread % 8), raw[i]);
  }
  fence_async_proxy();
  warpgroup_barrier(group);
}

// acc = the product of one tile. Leaves `ring` behind the tile's last stage.
template <typename Tile>
__device__ __forceinline__ void multiply_tile(const TmaConvolution& problem, uint32_t stages,
                                              const TmaBarriers<Tile>& barriers, StageRing<Tile::kStages>& ring,
                                              int group, int thread, TmaAccumulator<Tile>& acc) {
  const int lane = thread % 32;
  const int rows_of_group = Tile::kInTurns ? 0 : group * Tile::kGroupRows;
#pragma unroll
  for (int half = 0; half < Tile::kGroupRows / 64; ++half) {
#pragma unroll
    for (int i = 0; i < Tile::kColumns / 2; ++i) acc[half][i] = 0.0f;
  }
  const int taps = problem.filter_h * problem.filter_w;
  int before = -1;  // the stage whose products are still running
  [[maybe_unused]] PrologueFactors factors;
  if constexpr (Tile::kPrologue) factors.load(problem, thread % 8 * 8);
  for (int tap = 0; tap < taps; ++tap) {
    for (int block = 0; block < problem.channel_blocks; ++block) {
      const uint32_t tile_a = stages + ring.stage * Tile::kStageBytes + rows_of_group * 128;
      const uint32_t tile_b = stages + ring.stage * Tile::kStageBytes + Tile::kBytesA;
      barrier_wait(barriers.full(ring.stage), ring.parity);
      if constexpr (Tile::kPrologue) {
        apply_prologue_in_place<Tile>(factors, problem.input_relu, tile_a, group, thread);
        factors.load(problem, (block + 1) * kTensorMapRow + thread % 8 * 8);
      }
      wgmma_fence();
      if (block + 1 < problem.channel_blocks || problem.last_steps == 4) {
#pragma unroll
        for (int step = 0; step < 4; ++step) multiply_step<Tile>(acc, tile_a, tile_b, step);
        wgmma_commit();
      } else {
        for (int step = 0; step < problem.last_steps; ++step) multiply_step<Tile>(acc, tile_a, tile_b, step);
        wgmma_commit();
      }
      wgmma_wait<1>();
      if (before >= 0 && lane == 0) barrier_arrive(barriers.empty(before));
      before = ring.stage;
      ring.advance();
    }
  }
  if (Tile::kInTurns && lane == 0) barrier_arrive(barriers.turn(1 - group));
  wgmma_wait<0>();
#pragma unroll
  for (int half = 0; half < Tile::kGroupRows / 64; ++half) hold(acc[half]);
  if (lane == 0) barrier_arrive(barriers.empty(before));
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
  const int stages_of_tile = problem.filter_h * problem.filter_w * problem.channel_blocks;
  const int step = static_cast<int>(gridDim.x) * (Tile::kInTurns ? 2 : 1);
  const int rows_of_group = Tile::kInTurns ? 0 : group * Tile::kGroupRows;
  int tile = static_cast<int>(blockIdx.x);
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
    multiply_tile<Tile>(problem, stages, barriers, ring, group, thread, acc);
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
  if (warpgroup == 0) {
    release_registers<40>();
    if (thread == 0) copy_tiles<Tile>(problem, stages, barriers);
  } else {
    claim_registers<232>();
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

PixelMap pixels_of(const ConvProblem& problem, int tile_pixels) {
  const ConvShape& shape = problem.shape;
  PixelMap pixels = {};
  pixels.first_w = -shape.pad_left;
  pixels.first_h = -shape.pad_top;
  pixels.columns = shape.by_row.divisor;
  pixels.rows = shape.by_image.divisor / shape.by_row.divisor;
  pixels.stride_w = shape.stride_w;
  pixels.stride_h = shape.stride_h;
  pixels.tile_pixels = tile_pixels;
  return pixels;
}

template <typename Tile>
void launch_tma_tile(const char* name, const ConvProblem& problem, const LaunchTarget& target) {
  constexpr DType kDType = kTypeOf16Bits<typename Tile::Type>;
  const ConvShape& shape = problem.shape;
  const int64_t filters = filters_of_all_groups(problem);
  const int64_t taps = taps_of(shape), column_tiles = ceil_divide(filters, Tile::kColumns);
  TmaConvolution convolution = {};
  convolution.input = pixel_map(input_of(problem, kDType), pixels_of(problem, Tile::kRows));
  convolution.weight =
      filter_map(problem.weight, kDType, filters, taps, shape.channels, problem.weight_row_stride, Tile::kColumns);
  convolution.out = matrix_map(rows_of(problem, kDType, problem.out, problem.out_stride), Tile::kGroupRows);
  convolution.has_residual = problem.residual != nullptr;
  if (convolution.has_residual) {
    const TensorView residual = rows_of(problem, kDType, problem.residual, problem.residual_stride);
    convolution.residual = matrix_map(residual, Tile::kGroupRows);
  }
  convolution.by_column_tiles = FastDivisor(column_tiles);
  convolution.by_image = shape.by_image;
  convolution.by_row = shape.by_row;
  convolution.tiles = static_cast<int32_t>(column_tiles * ceil_divide(shape.rows, Tile::kRows));
  convolution.filter_w = static_cast<int32_t>(shape.by_filter_w.divisor);
  convolution.filter_h = static_cast<int32_t>(taps / convolution.filter_w);
  convolution.channel_blocks = channel_blocks_of(shape);
  convolution.last_steps = last_steps_of(shape);
  convolution.stride_h = shape.stride_h;
  convolution.stride_w = shape.stride_w;
  convolution.pad_top = shape.pad_top;
  convolution.pad_left = shape.pad_left;
  convolution.dilation_h = shape.dilation_h;
  convolution.dilation_w = shape.dilation_w;
  convolution.filters = static_cast<int32_t>(filters);
  convolution.by_group_filters = FastDivisor(shape.filters);
  convolution.channels = shape.channels;
  convolution.scale = problem.scale;
  convolution.bias = problem.bias;
  convolution.relu = problem.relu;
  convolution.input_scale = problem.input_scale;
  convolution.input_shift = problem.input_shift;
  convolution.input_relu = problem.input_relu;
  const int64_t blocks = std::min<int64_t>(convolution.tiles, device_facts(target.device).multiprocessors);
  launch<conv2d_tma<Tile>>(name, target.device, dim3(static_cast<unsigned>(blocks)), Tile::kThreads, Tile::kSharedBytes,
                           target.stream, convolution);
}

}  // namespace

bool tma_fits(const ConvProblem& problem, DType dtype) {
  const ConvShape& shape = problem.shape;
  const int64_t taps = taps_of(shape), filter_w = shape.by_filter_w.divisor, filter_h = taps / filter_w;
  const auto aligned = [](const void* data, int64_t stride) { return aligned_16(data) && stride % 8 == 0; };
  const bool whole_blocks = shape.channels % kTensorMapRow == 0 && shape.filters % kTensorMapRow == 0;
  const bool plain_1x1 = taps == 1 && shape.pad_top == 0 && shape.pad_left == 0;  // no padded pixel: see pixel_map_fits
  return dtype != DType::f32 && (problem.groups == 1 || (whole_blocks && !problem.has_prologue())) &&
         (!problem.has_prologue() || plain_1x1) && problem.vector_output &&
         aligned(problem.input, shape.pixel_stride) && aligned(problem.weight, shape.channels) &&
         problem.weight_row_stride % 8 == 0 && (filter_h - 1) * shape.dilation_h < 256 &&
         (filter_w - 1) * shape.dilation_w < 256 && pixel_map_fits(input_of(problem, dtype), pixels_of(problem, 1));
}

template <typename T>
void launch_conv2d_tma(const ConvProblem& problem, int tile_rows, int tile_columns, bool in_turns,
                       const LaunchTarget& target) {
  if (problem.has_prologue()) {
    if (tile_columns == 128) {
      launch_tma_tile<TmaTile<T, 64, 128, false, 5, true>>("conv2d tma 128x128 staged", problem, target);
    } else {
      launch_tma_tile<TmaTile<T, 64, 64, false, 8, true>>("conv2d tma 128x64 staged", problem, target);
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

template void launch_conv2d_tma<__nv_bfloat16>(const ConvProblem&, int, int, bool, const LaunchTarget&);
template void launch_conv2d_tma<__half>(const ConvProblem&, int, int, bool, const LaunchTarget&);

}  // namespace fastcnn::cuda
