// 1x1 convolution with stride 1 on the CPU by Strassen's algorithm, one level deep, in Winograd's form.
//
//   y[p, k] = act(scale[k] * sum_c pro(x[p, c]) * w[k, c] + bias[k] + residual[p, k])
//
// Shapes: x is a matrix of pixels x channels, w of channels x columns, packed as for the plain sum:
// [column block][channel][kColumnBlock]. The algorithm (conv2d_strassen_micro.h) is applied to small blocks: up to
// 2*kMicroRows adjacent pixels of an image, cut in an upper and a lower half; a pair of adjacent column blocks; a chunk
// of at most 2*chunk_half channels, cut in halves. So it costs no more memory than the plain sum, and which values meet
// depends on the shapes of one image and the weights, not on the batch or the number of threads. Where the number of
// column blocks is odd, the last one is computed by the plain sum. A lower half that is a pixel short counts it as
// zeros.
//
// Work: a task owns some blocks of pixels x some pairs of column blocks. Chunk by chunk it brings its input: the sums S
// of quadrants and, where the input cannot be read in place, the quadrants themselves, with the prologue applied. Then,
// for each pair of column blocks and each block of pixels, the products.
//
// Kept in registers: a quadrant's accumulators. In L1: the micro-tile's input of one product and its partial sums. In
// L2: the task's sums S (in place 4, else 7 quadrants for the 4 of the input), one pair's weights and their sums T,
// partial sums between chunks; the weights that follow are fetched meanwhile.
//
// Floor: 7/8 of the plain sum's 2*N*P*Q*K*C FLOPs at the FMA rate. Beside them: 4 sums of quadrants of the input for
// each task that reads it, 7 stores and 8 loads of a quadrant of sums for each 7 products.

#include "conv2d_gather.h"
#include "conv2d_strassen_micro.h"
#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

static inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// What the panel holds of a block of pixels: sums, then the input's own quadrants where they are not read in place. A21
// is only needed by the plain sum.
enum Slot : int64_t { kS1, kS2, kS3, kS4, kA11, kA12, kA22, kA21 };

static int64_t slots_of(const StrassenProblem& problem) {
  if (problem.in_place && problem.out.h * problem.out.w % 2 == 0) return kS4 + 1;
  return problem.column_blocks % 2 == 0 ? kA22 + 1 : kA21 + 1;
}

// Rows spread over the cache's sets.
static int64_t panel_stride(const StrassenProblem& problem) {
  return (problem.chunk_half + 15) / 16 * 16 + 16;
}

static int64_t panel_block_floats(const StrassenProblem& problem) {
  return slots_of(problem) * kMicroRows * panel_stride(problem);
}

// A block of pixels of one image: an even number of them, but for the last block of an odd number.
struct PixelBlock {
  int64_t begin, end;
  PixelBlock(const StrassenProblem& problem, int64_t index) {
    const int64_t pixels = problem.out.h * problem.out.w, pairs = (pixels + 1) / 2;
    const int64_t count = problem.blocks_per_image, image = index / count, block = index % count;
    begin = image * pixels + block * pairs / count * 2;
    end = image * pixels + smaller((block + 1) * pairs / count * 2, pixels);
  }
  int64_t upper() const { return (end - begin + 1) / 2; }
  int64_t lower() const { return (end - begin) / 2; }
};

// One pixel of the upper half and its partner of the lower one, or null: their channels' sums, and copies.
template <bool HasPrologue, bool Copies>
static void bring_pair(const StrassenProblem& problem, const float* upper, const float* lower, int64_t channel,
                       int64_t half, float* to, int64_t slot_stride) {
  const bool copies_a21 = Copies && problem.column_blocks % 2 != 0;
  for (int64_t c = 0; c < half; c += kVectorWidth) {
    const int64_t lanes = half - c;
    const auto read = [&](const float* pixel, int64_t from) {
      if (pixel == nullptr) return Vector{};
      const Vector x = lanes < kVectorWidth ? load_some(pixel + from, lanes) : load(pixel + from);
      if (!HasPrologue) return x;
      const ChannelPrologue prologue = {problem.input_scale ? problem.input_scale + from : nullptr,
                                        problem.input_shift ? problem.input_shift + from : nullptr, problem.input_relu};
      return prologue(x, 0, lanes);
    };
    const Vector a11 = read(upper, channel + c), a12 = read(upper, channel + half + c);
    const Vector a21 = read(lower, channel + c), a22 = read(lower, channel + half + c);
    const Vector s1 = a21 + a22, s2 = s1 - a11;
    store(to + kS1 * slot_stride + c, s1);
    store(to + kS2 * slot_stride + c, s2);
    store(to + kS3 * slot_stride + c, a11 - a21);
    store(to + kS4 * slot_stride + c, a12 - s2);
    if (!Copies) continue;
    store(to + kA11 * slot_stride + c, a11);
    store(to + kA12 * slot_stride + c, a12);
    store(to + kA22 * slot_stride + c, a22);
    if (copies_a21) store(to + kA21 * slot_stride + c, a21);
  }
}

static bool reads_in_place(const StrassenProblem& problem, const PixelBlock& block) {
  return problem.in_place && block.upper() == block.lower();
}

static void bring_block(const StrassenProblem& problem, const PixelBlock& block, int64_t channel, int64_t half,
                        float* panel) {
  const int64_t pitch = problem.input.pixel_stride, stride = panel_stride(problem);
  const float* upper = static_cast<const float*>(problem.input.data) + block.begin * pitch;
  const float* lower = upper + block.upper() * pitch;
  const auto bring = problem.has_prologue()           ? bring_pair<true, true>
                     : reads_in_place(problem, block) ? bring_pair<false, false>
                                                      : bring_pair<false, true>;
  for (int64_t i = 0; i < block.upper(); ++i) {
    bring(problem, upper + i * pitch, i < block.lower() ? lower + i * pitch : nullptr, channel, half,
          panel + i * stride, kMicroRows * stride);
  }
}

}  // namespace

int64_t strassen_scratch_bytes(const StrassenProblem& problem) {
  const int64_t panel = problem.pixel_blocks_per_task * panel_block_floats(problem);
  const int64_t weight_sums = 4 * problem.chunk_half * kColumnBlock;
  const bool one_chunk = 2 * problem.chunk_half >= problem.in_channels;
  const int64_t partial = problem.pixel_blocks_per_task * problem.pairs_per_task * 4 * kQuadrantFloats;
  return (panel + weight_sums + (one_chunk ? 0 : partial)) * 4;
}

void strassen_task(const StrassenProblem& problem, int64_t index, void* scratch) {
  const StrassenProblem& p = problem;
  const int64_t first_pair = index / p.row_tasks * p.pairs_per_task;
  const int64_t last_pair = smaller(first_pair + p.pairs_per_task, (p.column_blocks + 1) / 2);
  const int64_t first_block = index % p.row_tasks * p.pixel_blocks_per_task;
  const int64_t blocks = smaller(p.pixel_blocks_per_task, p.out.n * p.blocks_per_image - first_block);
  const int64_t block_floats = p.in_channels * kColumnBlock;  // of a column block's weights
  const int64_t slot = kMicroRows * panel_stride(p), pitch = p.input.pixel_stride;
  float* panel = static_cast<float*>(scratch);
  float* weight_sums = panel + p.pixel_blocks_per_task * panel_block_floats(p);
  float* partial = weight_sums + 4 * p.chunk_half * kColumnBlock;

  StrassenTile tile;
  tile.problem = &p;
  for (int64_t channel = 0; channel < p.in_channels; channel += 2 * p.chunk_half) {
    const int64_t half = smaller(p.chunk_half, (p.in_channels - channel) / 2), part = half * kColumnBlock;
    tile.reduction = half;
    tile.load_partial = channel > 0;
    tile.finish = channel + 2 * half == p.in_channels;
    for (int64_t b = 0; b < blocks; ++b) {
      bring_block(p, PixelBlock(p, first_block + b), channel, half, panel + b * panel_block_floats(p));
    }
    for (int64_t pair = first_pair; pair < last_pair; ++pair) {
      const bool whole = 2 * pair + 1 < p.column_blocks;
      const float* b11 = p.packed_weight + 2 * pair * block_floats + channel * kColumnBlock;
      const float* b21 = b11 + part;
      const float* b12 = whole ? b11 + block_floats : b11;
      const float* b22 = b12 + part;
      float *t1 = weight_sums, *t2 = t1 + part, *t3 = t2 + part, *t4 = t3 + part;
      // The weights that follow: of this chunk the next pair's, then the first pair's of the next chunk or task.
      const float* next = pair + 1 < last_pair ? b11 + 2 * block_floats
                          : !tile.finish
                              ? p.packed_weight + 2 * first_pair * block_floats + (channel + 2 * half) * kColumnBlock
                          : index % p.row_tasks + 1 < p.row_tasks ? p.packed_weight + 2 * first_pair * block_floats
                                                                  : p.packed_weight + 2 * last_pair * block_floats;
      for (int64_t b = 0; b < blocks; ++b) {
        const PixelBlock block(p, first_block + b);
        const bool in_place = reads_in_place(p, block), form = b == 0;
        const float* own = panel + b * panel_block_floats(p);
        const int64_t own_stride = panel_stride(p), stride = in_place ? pitch : own_stride;
        const float* upper = static_cast<const float*>(p.input.data) + block.begin * pitch + channel;
        const float* lower = upper + block.upper() * pitch;
        const float* a11 = in_place ? upper : own + kA11 * slot;
        const float* a12 = in_place ? upper + half : own + kA12 * slot;
        const float* a21 = in_place ? lower : own + kA21 * slot;
        const float* a22 = in_place ? lower + half : own + kA22 * slot;
        Quadrant quadrants[4];
        for (int q = 0; q < 4; ++q) {
          Quadrant& to = quadrants[q];
          to.rows = q < 2 ? block.upper() : block.lower();
          to.pixel = block.begin + (q < 2 ? 0 : block.upper());
          to.channel = (2 * pair + q % 2) * kColumnBlock;
          to.columns = smaller(p.out_channels - to.channel, kColumnBlock);
          to.scale = p.scale + to.channel;
          to.bias = p.bias + to.channel;
          to.partial = partial + ((b * p.pairs_per_task + pair - first_pair) * 4 + q) * kQuadrantFloats;
        }
        const auto minus = [form](const float* weight) { return form ? weight : nullptr; };
        const StrassenStep strassen[] = {
            {own + kS1 * slot, own_stride, form ? b12 : t1, minus(b11), t1, Begin::zero, End::keep, 0, -1},
            {a11, stride, b11, nullptr, nullptr, Begin::zero, End::hold, 0, 0},
            {a12, stride, b21, nullptr, nullptr, Begin::go_on, End::finish, 0, 3},
            {own + kS2 * slot, own_stride, form ? b22 : t2, minus(t1), t2, Begin::held, End::hold, 0, 2},
            {own + kS3 * slot, own_stride, form ? b22 : t3, minus(b12), t3, Begin::go_on, End::finish_kept, 3, 1},
            {a22, stride, form ? b21 : t4, minus(t2), t4, Begin::spare, End::finish, 2, -1},
            {own + kS4 * slot, own_stride, b22, nullptr, nullptr, Begin::held_and_kept, End::finish, 1, -1},
        };
        const StrassenStep plain[] = {
            {a11, stride, b11, nullptr, nullptr, Begin::zero, End::go_on, 0, 0},
            {a12, stride, b21, nullptr, nullptr, Begin::go_on, End::finish, 0, 2},
            {a21, stride, b11, nullptr, nullptr, Begin::zero, End::go_on, 2, -1},
            {a22, stride, b21, nullptr, nullptr, Begin::go_on, End::finish, 2, -1},
        };
        tile.quadrants = quadrants;
        tile.steps = whole ? strassen : plain;
        tile.count = whole ? kStrassenProducts : 4;
        // Each step's share of them: of a pair's two column blocks, the first in the first half of the steps.
        const int64_t bytes = (whole ? 4 : 2) * part * 4, steps = blocks * tile.count;
        for (int s = 0; s < tile.count; ++s) {
          int64_t at = (b * tile.count + s) * bytes / steps;
          if (at >= 2 * part * 4) at += (block_floats - 2 * part) * 4;
          tile.ahead[s] = reinterpret_cast<const char*>(next) + at;
        }
        tile.ahead_step = bytes / steps / half;
        kStrassenMicroTiles.by_rows[block.upper()](tile);
      }
    }
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
