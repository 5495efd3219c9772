// Convolution on the CPU by Winograd's minimal filtering, for square filters with dilation 1: F(6x6, 3x3), F(4x4, 3x3),
// F(2x2, 3x3), F(4x4, 5x5) and F(2x2, 5x5), and with a stride F(4x4, 3x3), F(2x2, 3x3), F(4x4, 4x4), F(2x2, 2x2) and
// F(2x2, 5x5) of the input's phases.
//
//   Y = A^T [ sum_c (G w[k,c] G^T) . (B^T pro(x)[c] B) ] A      for each m x m tile of the output and each k
//   y = act(scale[k] * Y + bias[k] + residual)
//
// (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015; points after Barabasz et al., "Error
// Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", 2020.) With t = m + r - 1 a
// tile of m x m outputs under r x r filters costs t*t products for every (c, k) where the sum costs r*r*m*m: 4 times
// fewer for F(4x4, 3x3), 5.06 times for F(6x6, 3x3), 2.25 times for F(2x2, 3x3), 6.25 times for F(4x4, 5x5), 2.78 times
// for F(2x2, 5x5).
//
// Strides: a convolution of stride s is one of stride 1 over the s*s phases of its input, each with channels of its own
// and a filter of ceil(r/s) taps a side (conv2d_winograd_phases.h). Where a phase has one tap less, its filter is zero
// at the point infinity, and nothing is multiplied there: a 7x7 filter with stride 2 costs 169/16 products an output
// for every (c, k) where the sum costs 49, an 11x11 filter with stride 4 529/16 where the sum costs 121, a 3x3 filter
// with stride 2 25/4 (F(2x2, 2x2)) where the sum costs 9.
//
// Short tiles: only a tile's last outputs need its products at infinity. So a tile that is an output short in height or
// width has none of them there: 14 outputs are 4 + 4 + 3 + 3, with 6 + 6 + 5 + 5 points, and 14x14 costs 484 products
// where four whole tiles a side cost 576. Of an output's tiles in a row the last ones are short, as many as fit it best
// (13 = 4 + 3 + 3 + 3), none where that saves next to nothing. Where windows of max pooling are taken on the way back,
// tiles are whole, as windows must lie in them; freezing asks for that only where they begin at the same places
// (PackedConv2dWinogradWeight::may_pool).
//
// Points: t = 8 interpolates at 0, +-1/2, +-1, +-2 and infinity, t = 7 at +-3/8, +-7/8, +-7/4 and infinity, t = 6 at 0,
// +-5/8, +-3/2 and infinity, t = 4 at 0, +-1 and infinity, t = 3 at +-1 and infinity. For t = 6 the textbook's 0, +-1,
// +-2 make the transforms' coefficients whole numbers but cost twice the error: what counts is that the powers of the
// points stay near 1, on both sides. All coefficients here are exact in fp32.
//
// Layouts, with L lanes to a vector:
//   transformed input  [tile block][point][channel vector][tile][L], tiles in the order of TileOrder (those that have
//                      a point are adjacent), points padded apart to an odd number of vectors so that a tile's t*t
//                      stores do not meet in the same sets of the cache; a vector holds channels of one phase or,
//                      where they are few, of several
//   weights            [column block][point][channel][kColumnBlock], transformed in double by conv2d_winograd.cpp,
//                      without the channels that are zero at a point
//   products           [column block][point][tile][kColumnBlock], of one tile block and one, two or four column blocks
//
// Work: tiles of all images are numbered in one row and cut into blocks of `tiles_per_block`. A task is one block and
// `columns_per_task` column blocks. It transforms the block's input into its own scratch, vector of channels by vector
// of channels (gather, zero padding, strides, prologue and bf16 are dealt with there); for one or some of its column
// blocks at a time the t*t matrix products are formed by the register-blocked micro-kernel, then transformed back,
// finished and stored. So weights are read once for each block, and a panel that L2 does not hold once for the column
// blocks that are formed together. Where there are few tiles, threads share out the column blocks instead, and
// each transforms the input for itself: that costs less than to wait for each other's transforms and fetch them from
// another core's cache. Meanwhile the next block's input and, where the weights stay in L2, this one's output are
// fetched.
//
// Kept in registers: the micro-tile's sums, two weight vectors, one broadcast; a column of a transform. In L1: a
// micro-tile's rows of the panel. In L2: a block's transformed input and the products of one column block.
//
// conv2d_winograd_bf16.cpp forms the products in bf16.
//
// Floor: 2*t*t*tiles*C*K FLOPs at the FMA rate plus the transforms (about 3*t*t + 3*m*t operations a tile and channel
// each way); the transformed weights, t*t/(r*r) times the plain ones, are read once a tile block.

#include "conv2d_winograd.h"

#include "conv2d_winograd_few.h"
#include "variant.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

// Products in fp32.
struct Fp32Products {
  // Rounding grows with a chunk's length, and the way back enlarges it.
  static constexpr int64_t kChunkRuns = 32 / kVectorWidth;
  static constexpr int64_t kVectorChannels = kVectorWidth;

  template <typename T, int kTile>
  static inline void transform(const WinogradProblem& problem, const TilePlace& place, Phase phase, int64_t channel,
                               int64_t point_stride, float* to) {
    const auto put = [&](int i, int j, Vector value)
                         __attribute__((always_inline)) { store(to + (i * kTile + j) * point_stride, value); };
    if constexpr (kTile % 2 == 0) {
      if (problem.stride == 1) return transform_vector<T, kTile>(problem, place, channel, put);
    }
    transform_phase<kTile>(ChannelReader<T, kTile>(problem, place, phase, channel), put);
  }
  static inline Vector spread(const float* word) { return broadcast(*word); }
  static inline void add(Vector& sum, Vector x, Vector w) { sum += x * w; }
};

}  // namespace

int64_t winograd_scratch_bytes(const WinogradProblem& problem) {
  return has_few_channels(problem) ? few_scratch_bytes(problem) : scratch_bytes(problem);
}

void winograd_task(const WinogradProblem& problem, int64_t index, void* scratch) {
  float* memory = static_cast<float*>(scratch);
  if (has_few_channels(problem)) return run_few(problem, index, memory);
  const auto is = [&](int tile, int side) { return problem.tile == tile && problem.side == side; };
  if (is(2, 3)) return run<Fp32Products, 2, 3>(problem, index, memory);
  if (is(2, 4)) return run<Fp32Products, 2, 4>(problem, index, memory);
  if (is(2, 6)) return run<Fp32Products, 2, 6>(problem, index, memory);
  if (is(4, 6)) return run<Fp32Products, 4, 6>(problem, index, memory);
  if (is(4, 7)) return run<Fp32Products, 4, 7>(problem, index, memory);
  if (is(4, 8)) return run<Fp32Products, 4, 8>(problem, index, memory);
  run<Fp32Products, 6, 8>(problem, index, memory);
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
