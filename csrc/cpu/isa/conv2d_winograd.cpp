// Convolution on the CPU by Winograd's minimal filtering F(4x4, 3x3), F(2x2, 3x3) and F(2x2, 5x5), for 3x3 and 5x5
// filters with stride 1 and dilation 1.
//
//   Y = A^T [ sum_c (G w[k,c] G^T) . (B^T pro(x)[c] B) ] A      for each m x m tile of the output and each k
//   y = act(scale[k] * Y + bias[k] + residual)
//
// (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015; points after Barabasz et al., "Error
// Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", 2020.) With t = m + r - 1 a
// tile of m x m outputs under r x r filters costs t*t products for every (c, k) where the sum costs r*r*m*m: 4 times
// fewer for F(4x4, 3x3), 2.25 times for F(2x2, 3x3), 2.78 times for F(2x2, 5x5).
//
// Points: t = 6 interpolates at 0, +-5/8, +-3/2 and infinity, t = 4 at 0, +-1 and infinity. The textbook's 0, +-1, +-2
// make the transforms' coefficients whole numbers but cost twice the error: what counts is that the powers of the
// points stay near 1, on both sides. All coefficients here are exact in fp32.
//
// Layouts, with L lanes to a vector:
//   transformed input  [tile block][point][channel vector][tile][L], points padded apart to an odd number of vectors
//                      so that a tile's t*t stores do not meet in the same sets of the cache
//   weights            [column block][point][channel][kColumnBlock], transformed in double by conv2d_winograd.cpp
//   products           [point][tile][kColumnBlock], of one tile block and one column block
//
// Work: tiles of all images are numbered in one row and cut into blocks of `tiles_per_block`. A task is one block and
// `columns_per_task` column blocks. It transforms the block's input into its own scratch, vector of channels by vector
// of channels (gather, zero padding, strides, prologue and bf16 are dealt with there); for each of its column blocks
// the t*t matrix products are formed by the register-blocked micro-kernel, then transformed back, finished and stored.
// So weights are read once for each block. Where there are few tiles, threads share out the column blocks instead, and
// each transforms the input for itself: that costs less than to wait for each other's transforms and fetch them from
// another core's cache.
//
// Kept in registers: the micro-tile's sums, two weight vectors, one broadcast; a column of a transform. In L1: a
// micro-tile's rows of the panel. In L2: a block's transformed input and the products of one column block.
//
// conv2d_winograd_bf16.cpp forms the products in bf16.
//
// Floor: 2*t*t*tiles*C*K FLOPs at the FMA rate plus the transforms (about 3*t*t + 3*m*t operations a tile and channel
// each way); the transformed weights, t*t/(r*r) times the plain ones, are read once a tile block.

#include "conv2d_winograd.h"

#include "variant.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

// Products in fp32.
struct Fp32Products {
  // Rounding grows with a chunk's length, and the way back enlarges it.
  static constexpr int64_t kChunkVectors = 32 / kVectorWidth;

  template <typename T, int kTile>
  static inline void transform(const WinogradProblem& problem, const TilePlace& place, int64_t v, int64_t point_stride,
                               float* to) {
    const auto put = [&](int i, int j, Vector value)
                         __attribute__((always_inline)) { store(to + (i * kTile + j) * point_stride, value); };
    transform_vector<T, kTile>(problem, place, v * kVectorWidth, put);
  }
  static inline Vector spread(const float* word) { return broadcast(*word); }
  static inline void add(Vector& sum, Vector x, Vector w) { sum += x * w; }
};

}  // namespace

int64_t winograd_scratch_bytes(const WinogradProblem& problem) {
  return (panel_floats(problem) + point_count(problem) * product_point_stride(problem)) * 4;
}

void winograd_task(const WinogradProblem& problem, int64_t index, void* scratch) {
  float* memory = static_cast<float*>(scratch);
  if (problem.side == 4) {
    run<Fp32Products, 2, 4>(problem, index, memory);
  } else if (problem.tile == 4) {
    run<Fp32Products, 4, 6>(problem, index, memory);
  } else {
    run<Fp32Products, 2, 6>(problem, index, memory);
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
