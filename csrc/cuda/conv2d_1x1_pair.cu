// Two 1x1 convolutions in one kernel on Hopper (sm_90a): a bottleneck's expansion with residual and ReLU, and the next
// block's reduction with ReLU. bf16 and fp16.
//
//   wide[m, j]   = relu(sum_c input[m, c] * expand[j, c] * scale1[j] + bias1[j] + residual[m, j])     both are outputs
//   narrow[m, k] = relu(sum_j wide[m, j] * reduce[k, j] * scale2[k] + bias2[k])           of `wide` as it was rounded
//   m = pixel (N*H*W), c < C, j < J, k < K; all in NHWC memory, channel slices included. C, J, K: multiples of 8,
//   which copies fill up to multiples of 64 with zeros. K <= 256.
//
// Work: one block per multiprocessor walks over tiles of pixels. One warpgroup copies; two or three multiply, each 64
//   rows of the tile, through chunks of 64 columns of `wide`: product 1 into registers, epilogue, and product 2 of the
//   chunk is added to the sums of `narrow`, which stay in registers until the tile's last chunk.
// Shared memory:
//   weights   a stage holds a chunk's 64 rows of `expand` and 64 columns of `reduce`. All chunks stay for the block's
//             life where they fit (64 -> 256 -> 64, 128); else they stream from L2 through a ring of stages that all
//             warpgroups share
//   input     the tile's rows, of each warpgroup; double where there is room
//   boxes     a ring of 64 pixels by 64 channels for each warpgroup. The copy engine brings a chunk's residual; the
//             epilogue turns it into `wide` in place, in the 128B swizzle, so the same box is stored by the copy engine
//             and read by wgmma as operand A of product 2. Results of `narrow` leave through boxes too. Boxes that are
//             free fill with residuals of chunks and tiles to come, so that memory never waits for a product.
// Before an earlier kernel has ended: barriers, and the weights of the first stages.
// Registers: the accumulators, 32 of `wide` and K / 2 of `narrow` a thread.
// Floor: (C + 2*J + K) * 2 bytes a pixel through DRAM; two kernels take J * 2 more. 2*(C + K)*J operations a pixel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "device/numeric.cuh"
#include "device/ptx.cuh"
#include "device/tile_layout.h"
#include "device/tma.cuh"
#include "device/tma_epilogue.cuh"
#include "device/wgmma.cuh"
#include "host.h"
#include "kernels.h"
#include "tensor_map.h"

namespace fastcnn::cuda {

constexpr int kPairRows = 64, kPairBox = kPairRows * 128;  // rows of a warpgroup; bytes of 64 channels of them

// How a block's shared memory is used. Set on the host.
struct PairPlan {
  int32_t stages, input_buffers, boxes;  // of weights; of each warpgroup
  bool resident;                         // a stage for each chunk
  int32_t input_blocks, chunks;          // of 64 channels; of 64 columns of `wide`
  int32_t stage_bytes, input_bytes;      // of a buffer
  int32_t shared_bytes;

  FASTCNN_HD int barriers(int groups) const { return 2 * stages + 2 * groups * (input_buffers + boxes); }
};

struct PairProblem {
  TensorMap input, expand, residual, wide, reduce, narrow;
  const float *scale1, *bias1, *scale2, *bias2;
  int32_t wide_channels, narrow_channels;
  int32_t tiles;
  PairPlan plan;
};

#if defined(FASTCNN_HAS_WGMMA)

template <typename T, int kNarrow_, int kGroups_>
struct PairTile {
  using Type = T;
  static constexpr int kNarrow = kNarrow_, kGroups = kGroups_;     // columns of `narrow`; warpgroups
  static constexpr int kColumns2 = kNarrow < 128 ? kNarrow : 128;  // of one wgmma
  static constexpr int kReleased = kGroups == 3 ? 32 : 40, kClaimed = kGroups == 3 ? 160 : 232;  // registers
};

// A position in a ring, and the parity of its round.
struct PairRing {
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int count) {
    if (++at < count) return;
    at = 0;
    parity ^= 1;
  }
};

// Where things are in shared memory, for warpgroup `group` of `groups`.
struct PairMemory {
  uint32_t weights, inputs, boxes, barriers;
  uint32_t group_barriers;
  const PairPlan& plan;

  __device__ __forceinline__ PairMemory(const PairPlan& plan_, uint32_t start, uint32_t coefficients_bytes, int groups,
                                        int group)
      : plan(plan_) {
    weights = start;
    const uint32_t all_inputs = weights + plan.stages * plan.stage_bytes;
    const uint32_t all_boxes = all_inputs + groups * plan.input_buffers * plan.input_bytes;
    inputs = all_inputs + group * plan.input_buffers * plan.input_bytes;
    boxes = all_boxes + group * plan.boxes * kPairBox;
    barriers = all_boxes + groups * plan.boxes * kPairBox + coefficients_bytes;
    group_barriers = barriers + (2 * plan.stages + group * 2 * (plan.input_buffers + plan.boxes)) * 8;
  }
  __device__ __forceinline__ uint32_t stage(int i) const { return weights + i * plan.stage_bytes; }
  __device__ __forceinline__ uint32_t stage_full(int i) const { return barriers + 2 * i * 8; }
  __device__ __forceinline__ uint32_t stage_empty(int i) const { return barriers + (2 * i + 1) * 8; }
  __device__ __forceinline__ uint32_t input(int i) const { return inputs + i * plan.input_bytes; }
  __device__ __forceinline__ uint32_t input_full(int i) const { return group_barriers + 2 * i * 8; }
  __device__ __forceinline__ uint32_t input_empty(int i) const { return group_barriers + (2 * i + 1) * 8; }
  __device__ __forceinline__ uint32_t box(int i) const { return boxes + i * kPairBox; }
  __device__ __forceinline__ uint32_t box_full(int i) const { return input_full(plan.input_buffers + i); }
  __device__ __forceinline__ uint32_t box_empty(int i) const { return input_empty(plan.input_buffers + i); }
};

// One chunk's weights into a stage that is free.
__device__ __forceinline__ void copy_pair_chunk(const PairProblem& problem, const PairMemory& memory, int stage,
                                                int chunk) {
  const PairPlan& plan = problem.plan;
  const uint32_t to = memory.stage(stage), full = memory.stage_full(stage);
  barrier_arrive_expecting(full, plan.stage_bytes);
  for (int block = 0; block < plan.input_blocks; ++block) {
    copy_box_3d(to + block * kPairBox, problem.expand, full, block * kTensorMapRow, 0, chunk * 64);
  }
  copy_box_3d(to + plan.input_blocks * kPairBox, problem.reduce, full, chunk * kTensorMapRow, 0, 0);
}

// Weights that stream, one thread of the block. The first chunks' have filled the stages already.
__device__ __forceinline__ void stream_pair_weights(const PairProblem& problem, const PairMemory& memory) {
  const PairPlan& plan = problem.plan;
  PairRing ring;
  int there = plan.stages;
  for (int tile = static_cast<int>(blockIdx.x); tile < problem.tiles; tile += static_cast<int>(gridDim.x)) {
    for (int chunk = 0; chunk < plan.chunks; ++chunk) {
      if (there > 0) {
        --there;
      } else {
        barrier_wait(memory.stage_empty(ring.at), ring.parity ^ 1);
        copy_pair_chunk(problem, memory, ring.at, chunk);
      }
      ring.advance(plan.stages);
    }
  }
}

// Input and residual of one warpgroup: one thread. A box for results of `narrow` is handed over as it is.
template <typename Tile>
__device__ __forceinline__ void copy_pair_pixels(const PairProblem& problem, const PairMemory& memory, int group) {
  const PairPlan& plan = problem.plan;
  const int narrow_boxes = (problem.narrow_channels + 63) / 64;
  PairRing inputs, boxes;
  for (int tile = static_cast<int>(blockIdx.x); tile < problem.tiles; tile += static_cast<int>(gridDim.x)) {
    const int row = (tile * Tile::kGroups + group) * kPairRows;
    barrier_wait(memory.input_empty(inputs.at), inputs.parity ^ 1);
    barrier_arrive_expecting(memory.input_full(inputs.at), plan.input_bytes);
    for (int block = 0; block < plan.input_blocks; ++block) {
      copy_box_2d(memory.input(inputs.at) + block * kPairBox, problem.input, memory.input_full(inputs.at),
                  block * kTensorMapRow, row);
    }
    inputs.advance(plan.input_buffers);
    for (int i = 0; i < plan.chunks + narrow_boxes; ++i) {
      const uint32_t full = memory.box_full(boxes.at);
      barrier_wait(memory.box_empty(boxes.at), boxes.parity ^ 1);
      if (i < plan.chunks) {
        barrier_arrive_expecting(full, kPairBox);
        copy_box_2d(memory.box(boxes.at), problem.residual, full, i * kTensorMapRow, row);
      } else {
        barrier_arrive(full);
      }
      boxes.advance(plan.boxes);
    }
  }
}

// One box of results from accumulators acc[first ...]: x = relu(acc * scale + bias (+ what lies there)). A lane holds
// pairs of columns, its quad 16 bytes of a row: see finish_tile in conv2d_tma.cu.
template <typename T, bool kResidual, int kCount>
__device__ __forceinline__ void finish_pair_box(const float (&acc)[kCount], int first, uint32_t box,
                                                const float2* coefficients, int warp, int lane) {
  constexpr int kBatch = 4;  // of 8 columns
  const int row = warp * 16 + lane / 4, pair = lane % 4;
#pragma unroll
  for (int begin = 0; begin < 8; begin += kBatch) {
    float4 factors[kBatch];  // scale, bias of a column and of the next
    uint32_t residual[kBatch][2], at[kBatch][2];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      factors[i] = *reinterpret_cast<const float4*>(coefficients + (begin + i) * 8 + pair * 2);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        at[i][part] = box + tile_offset<128>(row + part * 8, begin + i) + pair * 4;
        if constexpr (kResidual) residual[i][part] = load_shared_4(at[i][part]);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int value = first + (begin + i) * 4 + part * 2;
        float x = acc[value] * factors[i].x + factors[i].y, y = acc[value + 1] * factors[i].z + factors[i].w;
        if constexpr (kResidual) {
          const float2 added = unpack(residual[i][part], T());
          x += added.x;
          y += added.y;
        }
        store_shared_4(at[i][part], pack<T>(relu(x), relu(y)));
      }
    }
  }
}

// What a multiplying warpgroup keeps of its boxes: the last one is still being stored and multiplied.
struct PairBoxes {
  PairRing ring;
  int before = -1;
};

// The box's results go to `map` at (column, row).
__device__ __forceinline__ void store_pair_box(const PairMemory& memory, const TensorMap& map, const PairBoxes& boxes,
                                               int column, int row, int group, int thread) {
  fence_async_proxy();
  warpgroup_barrier(group);
  if (thread == 0) {
    store_box_2d(map, memory.box(boxes.ring.at), column, row);
    store_commit();
  }
}

// On to the next box. The one before this one is free: its store was committed a box ago, and the products that read it
// are done.
__device__ __forceinline__ void next_pair_box(const PairMemory& memory, PairBoxes& boxes, int thread) {
  if (thread == 0) store_wait_read<1>();
  if (thread % 32 == 0 && boxes.before >= 0) barrier_arrive(memory.box_empty(boxes.before));
  boxes.before = boxes.ring.at;
  boxes.ring.advance(memory.plan.boxes);
}

// What one multiplying warpgroup does.
template <typename Tile>
__device__ __forceinline__ void compute_pairs(const PairProblem& problem, const PairMemory& memory,
                                              const float2* coefficients, int group, int thread) {
  using T = typename Tile::Type;
  constexpr int kColumns2 = Tile::kColumns2, kProducts2 = Tile::kNarrow / kColumns2;
  const PairPlan& plan = problem.plan;
  const int lane = thread % 32, warp = thread / 32;
  PairRing inputs, stages;
  PairBoxes boxes;
  for (int tile = static_cast<int>(blockIdx.x); tile < problem.tiles; tile += static_cast<int>(gridDim.x)) {
    const int row = (tile * Tile::kGroups + group) * kPairRows;
    if (plan.resident) stages = PairRing();  // they have come once and stay
    float sums[kProducts2][kColumns2 / 2];
#pragma unroll
    for (int i = 0; i < kProducts2; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns2 / 2; ++j) sums[i][j] = 0.0f;
    }
    barrier_wait(memory.input_full(inputs.at), inputs.parity);
    int chunk = 0, stage_before = -1;
    do {  // no way past the loops: see multiply_blocks in device/tma_stages.cuh
      float acc[32];
#pragma unroll
      for (int i = 0; i < 32; ++i) acc[i] = 0.0f;
      uint32_t a = memory.input(inputs.at), b = memory.stage(stages.at);
      barrier_wait(memory.stage_full(stages.at), stages.parity);
      wgmma_fence();
      int block = plan.input_blocks;
#pragma unroll 1
      do {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          wgmma<T, 64>(acc, wgmma_descriptor(a + step * 32), wgmma_descriptor(b + step * 32));
        }
        a += kPairBox;
        b += kPairBox;
      } while (--block > 0);
      wgmma_commit();
      wgmma_wait<0>();  // and product 2 of the chunk before is done
      hold(acc);
#pragma unroll
      for (int i = 0; i < kProducts2; ++i) hold(sums[i]);
      if (lane == 0) {
        if (chunk + 1 == plan.chunks) barrier_arrive(memory.input_empty(inputs.at));
        if (stage_before >= 0 && !plan.resident) barrier_arrive(memory.stage_empty(stage_before));
      }
      const uint32_t box = memory.box(boxes.ring.at);
      barrier_wait(memory.box_full(boxes.ring.at), boxes.ring.parity);
      finish_pair_box<T, true>(acc, 0, box, coefficients + chunk * 64, warp, lane);
      store_pair_box(memory, problem.wide, boxes, chunk * 64, row, group, thread);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int i = 0; i < kProducts2; ++i) {
          wgmma<T, kColumns2>(sums[i], wgmma_descriptor(box + step * 32),
                              wgmma_descriptor(b + i * kColumns2 * 128 + step * 32));
        }
      }
      wgmma_commit();
      next_pair_box(memory, boxes, thread);
      stage_before = stages.at;
      stages.advance(plan.stages);
    } while (++chunk < plan.chunks);
    inputs.advance(plan.input_buffers);
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kProducts2; ++i) hold(sums[i]);
    if (lane == 0 && !plan.resident) barrier_arrive(memory.stage_empty(stage_before));
#pragma unroll
    for (int column = 0; column < Tile::kNarrow; column += 64) {
      if (column >= problem.narrow_channels) break;
      barrier_wait(memory.box_full(boxes.ring.at), boxes.ring.parity);
      finish_pair_box<T, false>(sums[column / kColumns2], column % kColumns2 / 2, memory.box(boxes.ring.at),
                                coefficients + plan.chunks * 64 + column, warp, lane);
      store_pair_box(memory, problem.narrow, boxes, column, row, group, thread);
      next_pair_box(memory, boxes, thread);
    }
  }
  if (thread == 0) store_wait();
}

#endif

template <typename T, int kNarrow, int kGroups>
__global__ void __launch_bounds__(128 * (kGroups + 1), 1)
    conv2d_1x1_pair_kernel(const __grid_constant__ PairProblem problem) {
#if defined(FASTCNN_HAS_WGMMA)
  using Tile = PairTile<T, kNarrow, kGroups>;
  const int thread = static_cast<int>(threadIdx.x), warpgroup = uniform(thread / 128), warp = uniform(thread / 32);
  const PairPlan& plan = problem.plan;
  unsigned char* shared = dynamic_shared();
  shared += (1024 - shared_address(shared) % 1024) % 1024;
  const int columns = plan.chunks * 64 + kNarrow;
  const int group = warpgroup == 0 ? (warp == 0 ? 0 : warp - 1) : warpgroup - 1;
  const PairMemory memory(plan, shared_address(shared), columns * 8, kGroups, group < kGroups ? group : 0);
  float2* coefficients = reinterpret_cast<float2*>(shared + (memory.barriers - columns * 8 - memory.weights));
  if (thread == 0) {
    prefetch_tensor_map(problem.input);
    prefetch_tensor_map(problem.expand);
    prefetch_tensor_map(problem.residual);
    prefetch_tensor_map(problem.reduce);
    prefetch_tensor_map(problem.wide);
    prefetch_tensor_map(problem.narrow);
    for (int stage = 0; stage < plan.stages; ++stage) {
      barrier_init(memory.stage_full(stage), 1);
      barrier_init(memory.stage_empty(stage), 4 * kGroups);  // warps that multiply
    }
    for (int i = 0; i < kGroups; ++i) {
      const PairMemory of_group(plan, memory.weights, columns * 8, kGroups, i);
      for (int buffer = 0; buffer < plan.input_buffers + plan.boxes; ++buffer) {
        barrier_init(of_group.input_full(buffer), 1);
        barrier_init(of_group.input_empty(buffer), 4);
      }
    }
    barrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_begin();
  if (thread == 0) {
    for (int chunk = 0; chunk < plan.stages; ++chunk) copy_pair_chunk(problem, memory, chunk, chunk);
  }
  wait_for_earlier_kernels();
  for (int column = thread; column < columns; column += 128 * (kGroups + 1)) {
    const bool first = column < plan.chunks * 64;
    const int of_product = first ? column : column - plan.chunks * 64;
    const bool real = of_product < (first ? problem.wide_channels : problem.narrow_channels);
    const float* scale = first ? problem.scale1 : problem.scale2;
    const float* bias = first ? problem.bias1 : problem.bias2;
    coefficients[column] = make_float2(real && scale != nullptr ? __ldca(scale + of_product) : 1.0f,
                                       real && bias != nullptr ? __ldca(bias + of_product) : 0.0f);
  }
  __syncthreads();
  if (warpgroup == 0) {
    release_registers<Tile::kReleased>();
    if (thread == 0) {
      if (!plan.resident) stream_pair_weights(problem, memory);
    } else if (thread % 32 == 0 && warp <= kGroups) {
      copy_pair_pixels<Tile>(problem, memory, group);
    }
  } else {
    claim_registers<Tile::kClaimed>();
    compute_pairs<Tile>(problem, memory, coefficients, group, thread - warpgroup * 128);
  }
#else
  __trap();  // not compiled for sm_90a: the dispatcher must not come here
#endif
}

namespace {

constexpr int kPairLeastBoxes = 3, kPairMostBoxes = 6;

int columns_of_kernel(int64_t narrow_channels) {
  return narrow_channels <= 64 ? 64 : narrow_channels <= 128 ? 128 : 256;
}

int groups_of_kernel(int columns) {
  return columns <= 128 ? 3 : 2;  // by the registers of `narrow`
}

// Whether `stages` of weights and `input_buffers` fit beside at least `least` boxes; takes as many as there is room
// for.
bool plan_memory(PairPlan& plan, int columns, int shared_bytes, int stages, int input_buffers, int least) {
  const int groups = groups_of_kernel(columns);
  plan.stages = stages;
  plan.input_buffers = input_buffers;
  plan.resident = stages == plan.chunks;
  for (plan.boxes = kPairMostBoxes; plan.boxes >= least; --plan.boxes) {
    const int64_t bytes = static_cast<int64_t>(stages) * plan.stage_bytes +
                          static_cast<int64_t>(groups) * (input_buffers * plan.input_bytes + plan.boxes * kPairBox) +
                          (plan.chunks * 64 + columns) * 8 + plan.barriers(groups) * 8 + 1024;
    plan.shared_bytes = static_cast<int32_t>(std::min<int64_t>(bytes, INT32_MAX));
    if (bytes <= shared_bytes) return true;
  }
  return false;
}

bool make_plan(PairPlan& plan, int64_t channels, int64_t wide_channels, int64_t narrow_channels,
               const DeviceFacts& device) {
  if (channels < 1 || wide_channels < 1 || narrow_channels < 1) return false;
  if (channels > 1024 || wide_channels > 8192 || narrow_channels > 256) return false;
  const int columns = columns_of_kernel(narrow_channels);
  plan.input_blocks = static_cast<int32_t>(ceil_divide(channels, 64));
  plan.chunks = static_cast<int32_t>(ceil_divide(wide_channels, 64));
  plan.input_bytes = plan.input_blocks * kPairBox;
  plan.stage_bytes = plan.input_blocks * kPairBox + columns * 128;
  const int bytes = device.shared_bytes;
  return plan_memory(plan, columns, bytes, plan.chunks, 2, kPairLeastBoxes + 1) ||
         plan_memory(plan, columns, bytes, plan.chunks, 1, kPairLeastBoxes) ||
         plan_memory(plan, columns, bytes, std::min(3, plan.chunks), 1, kPairLeastBoxes) ||
         plan_memory(plan, columns, bytes, std::min(2, plan.chunks), 1, kPairLeastBoxes);
}

template <typename T, int kNarrow, int kGroups>
void launch_pair(const PairProblem& problem, int device, void* stream) {
  const int64_t blocks = std::min<int64_t>(problem.tiles, device_facts(device).multiprocessors);
  launch_early<conv2d_1x1_pair_kernel<T, kNarrow, kGroups>>(
      "conv2d 1x1 pair", device, dim3(static_cast<unsigned>(blocks)), 128 * (kGroups + 1),
      static_cast<size_t>(problem.plan.shared_bytes), stream, problem);
}

template <typename T>
void launch_pair_of(const PairProblem& problem, int device, void* stream) {
  switch (columns_of_kernel(problem.narrow_channels)) {
    case 64:
      return launch_pair<T, 64, 3>(problem, device, stream);
    case 128:
      return launch_pair<T, 128, 3>(problem, device, stream);
    default:
      return launch_pair<T, 256, 2>(problem, device, stream);
  }
}

}  // namespace

std::string conv2d_1x1_pair_weights(int64_t channels, int64_t wide_channels, int64_t narrow_channels, int device) {
  const DeviceFacts facts = device_facts(device);
  PairPlan plan = {};
  if (!facts.wgmma || channels % 8 != 0 || wide_channels % 8 != 0 || narrow_channels % 8 != 0 ||
      !make_plan(plan, channels, wide_channels, narrow_channels, facts)) {
    return "";
  }
  return plan.resident ? "resident" : "streamed";
}

std::string conv2d_1x1_pair_unsupported(const Conv1x1Pair& pair, int device) {
  const auto reads = [](const TensorView& view) { return aligned_16(view) && view.c % 8 == 0; };
  const DeviceFacts facts = device_facts(device);
  if (!facts.wgmma) return "needs a GPU of compute capability 9.0 and code for it";
  if (pair.input.dtype == DType::f32) return "fp32";
  if (!reads(pair.input) || !reads(pair.residual) || !reads(pair.wide) || !reads(pair.narrow)) {
    return "channels that are no multiples of 8, or pixels that are not aligned to 16 bytes";
  }
  if (!aligned_16(pair.expand_weight) || !aligned_16(pair.reduce_weight)) return "weights not aligned to 16 bytes";
  if (pair.input.pixels() >= int64_t{1} << 30) return "2^30 pixels or more";
  PairPlan plan = {};
  if (!make_plan(plan, pair.input.c, pair.wide.c, pair.narrow.c, facts)) {
    return "more channels than shared memory has room for";
  }
  return "";
}

void conv2d_1x1_pair(const Conv1x1Pair& pair, int device, void* stream) {
  const std::string reason = conv2d_1x1_pair_unsupported(pair, device);
  if (!reason.empty()) throw std::invalid_argument("fastcnn CUDA conv2d_1x1_pair: " + reason);
  const DeviceGuard guard(device);
  PairProblem problem = {};
  make_plan(problem.plan, pair.input.c, pair.wide.c, pair.narrow.c, device_facts(device));
  const int columns = columns_of_kernel(pair.narrow.c);
  const DType dtype = pair.input.dtype;
  problem.input = matrix_map(pair.input, kPairRows);
  problem.expand = filter_map(pair.expand_weight, dtype, pair.wide.c, 1, pair.input.c, pair.input.c, 64);
  problem.residual = matrix_map(pair.residual, kPairRows, true);
  problem.wide = matrix_map(pair.wide, kPairRows);
  problem.reduce = filter_map(pair.reduce_weight, dtype, pair.narrow.c, 1, pair.wide.c, pair.wide.c, columns);
  problem.narrow = matrix_map(pair.narrow, kPairRows);
  problem.scale1 = pair.expand_scale;
  problem.bias1 = pair.expand_bias;
  problem.scale2 = pair.reduce_scale;
  problem.bias2 = pair.reduce_bias;
  problem.wide_channels = static_cast<int32_t>(pair.wide.c);
  problem.narrow_channels = static_cast<int32_t>(pair.narrow.c);
  problem.tiles = static_cast<int32_t>(ceil_divide(pair.input.pixels(), kPairRows * groups_of_kernel(columns)));
  if (dtype == DType::bf16) return launch_pair_of<__nv_bfloat16>(problem, device, stream);
  launch_pair_of<__half>(problem, device, stream);
}

}  // namespace fastcnn::cuda
