// Winograd convolution with plain weights on the CPU: their packing and the work. The arithmetic is in
// isa/conv2d_winograd_plain.cpp.
#include "conv2d_winograd_plain.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa/table.h"
#include "preparation.h"

namespace fastcnn::cpu {
namespace {

constexpr int kTile = 4, kSide = 6, kTaps = 9;
constexpr float kNear = 0.625f, kFar = 1.5f;  // points; weights with an index 1 carry the power of the former
constexpr int64_t kTilesPerBlock = 16;        // whose products stay in L2
// Of groups no wider than a vector: enough tiles to be worth transforming the weights for.
constexpr int64_t kGroupedTilesPerBlock = 56, kGroupedTasksPerThread = 8;
constexpr int64_t kLeastGroup = 4;  // channels; of fewer, the transforms outweigh the products
// Of weights that are half transformed: bytes that stay in L2, shared out among two threads, beside other layers', and
// vectors whose sums a processor with 32 registers can hold.
constexpr int64_t kHalfTransformedBytes = 384 << 10;
constexpr int kHalfTransformedRows = 12;
constexpr int64_t kHalfTransformedVectors = 4;  // of outputs: two threads share out pairs of them
constexpr int64_t kSerialWork = 1 << 18;        // multiplications not worth waking a thread for

}  // namespace

bool PlainWinogradWeight::spans_groups(int64_t out_channels, int64_t in_channels, int64_t groups) {
  const int64_t group = in_channels / groups;
  return groups > 1 && out_channels == in_channels && in_channels % groups == 0 && group >= kLeastGroup &&
         group <= kernels().vector_width && kernels().vector_width % group == 0;
}

bool PlainWinogradWeight::covers(int64_t out_channels, int64_t in_channels, int64_t groups) {
  const int64_t whole = groups * kernels().vector_width;
  return groups == 1 || (out_channels % whole == 0 && in_channels % whole == 0) ||
         spans_groups(out_channels, in_channels, groups);
}

PlainWinogradWeight::PlainWinogradWeight(int64_t out_channels, int64_t in_channels, int64_t groups)
    : out_channels(out_channels),
      in_channels(in_channels),
      groups(groups),
      out_vectors(ceil_div(out_channels, kernels().vector_width)),
      in_vectors(ceil_div(in_channels, kernels().vector_width)),
      data_(nullptr, std::free) {
  const int64_t width = kernels().vector_width;
  depth = spans_groups(out_channels, in_channels, groups) ? in_channels / groups : in_vectors / groups * width;
  const int64_t half_bytes = out_vectors * width * depth * 2 * kTaps * 4;
  half_transformed = groups == 1 && out_vectors % kHalfTransformedVectors == 0 &&
                     kernels().micro_rows >= kHalfTransformedRows && half_bytes <= kHalfTransformedBytes;
  bytes_ = half_transformed ? half_bytes : half_bytes / 2;
  data_.reset(static_cast<float*>(allocate_aligned(bytes_)));
}

void PlainWinogradWeight::assign(const void* packed) {
  std::memcpy(data_.get(), packed, static_cast<size_t>(bytes_));
}

PlainWinogradWeight::PlainWinogradWeight(const void* weight, DType dtype, const int64_t shape[4],
                                         const int64_t strides[4], int64_t groups)
    : PlainWinogradWeight(shape[0], shape[1] * groups, groups) {
  for (int64_t k = 0; k < out_vectors * kernels().vector_width; ++k) {
    for (int64_t c = 0; c < depth; ++c) {
      float taps[3][3] = {};
      for (int64_t r = 0; r < 3; ++r) {
        for (int64_t s = 0; s < 3; ++s) {
          if (k >= out_channels || c >= shape[1]) continue;
          const int64_t from = k * strides[0] + c * strides[1] + r * strides[2] + s * strides[3];
          const double factor = (r == 1 ? kNear : 1.0) * (s == 1 ? kNear : 1.0);
          taps[r][s] = static_cast<float>(factor * read_as_float(weight, dtype, from));
        }
      }
      put(k, c, taps);
    }
  }
}

void PlainWinogradWeight::put(int64_t k, int64_t c, const float (&taps)[3][3]) {
  const int64_t width = kernels().vector_width;
  if (!half_transformed) {
    float* to = data_.get() + (k / width * depth + c) * kTaps * width + k % width;
    for (int tap = 0; tap < kTaps; ++tap) to[tap * width] = taps[tap / 3][tap % 3];
    return;
  }
  const int64_t chunk = 32 / width * width, first = c / chunk * chunk, channels = std::min(chunk, depth - first);
  float* to = data_.get() + (k / (2 * width) * depth + first) * kSide * 6 * width + k % (2 * width);
  for (int r = 0; r < 3; ++r) {
    // In fp32 and with the roundings of isa/conv2d_winograd_plain.cpp, so that results have the same bits.
    const auto& w = taps[r];
    const float near = std::fma(kNear * kNear, w[2], w[0]), far = std::fma(kFar * kFar, w[2], w[0]);
    const float columns[kSide] = {
        w[0], near + w[1], near - w[1], std::fma(kFar / kNear, w[1], far), std::fma(-(kFar / kNear), w[1], far), w[2]};
    for (int j = 0; j < kSide; ++j) to[((j * channels + c - first) * 3 + r) * 2 * width] = columns[j];
  }
}

Works conv2d_winograd_plain_work(const TensorView& out, const TensorView& input, const PlainWinogradWeight& weight,
                                 const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry,
                                 int threads, bool max_pool) {
  const KernelTable& table = kernels();
  const EpilogueVectors vectors(epilogue, 1, weight.out_channels, weight.out_vectors * table.vector_width);

  WinogradProblem p{};
  set_operands(p, out, input, prologue, epilogue, vectors);
  p.pad_top = geometry.pad_top;
  p.pad_left = geometry.pad_left;
  p.tile = kTile;
  p.side = kSide;
  p.packed_weight = weight.data();
  p.groups = weight.groups;
  p.channel_vectors = weight.in_vectors;
  p.column_blocks = weight.out_vectors;
  p.half_transformed = weight.half_transformed;
  p.max_pool = max_pool;
  p.tiles_h = ceil_div(max_pool ? 2 * out.h : out.h, kTile);
  p.tiles_w = ceil_div(max_pool ? 2 * out.w : out.w, kTile);
  p.tiles = out.n * p.tiles_h * p.tiles_w;
  const bool grouped = PlainWinogradWeight::spans_groups(weight.out_channels, weight.in_channels, weight.groups);
  p.tiles_per_block = ceil_div(p.tiles, ceil_div(p.tiles, grouped ? kGroupedTilesPerBlock : kTilesPerBlock));
  p.blocks = ceil_div(p.tiles, p.tiles_per_block);

  const int64_t pairs = p.out.c * p.input.c / weight.groups;  // of channels that meet
  if (p.tiles * kSide * kSide * pairs <= kSerialWork) threads = 1;
  // Threads share out the output channels where there are fewer blocks of tiles than threads.
  const int64_t wanted = grouped ? kGroupedTasksPerThread * threads : threads;
  const int64_t unit = weight.half_transformed ? 2 : 1;  // vectors that are computed together
  const int64_t parts = std::min(p.column_blocks / unit, ceil_div(wanted, p.blocks));
  p.columns_per_task = ceil_div(p.column_blocks / unit, parts) * unit;
  Work work;
  work.tasks = p.blocks * ceil_div(p.column_blocks, p.columns_per_task);
  work.threads = threads;
  const auto run = grouped ? table.winograd_grouped_task : table.winograd_plain_task;
  work.scratch_bytes = grouped ? table.winograd_grouped_scratch_bytes(p) : table.winograd_plain_scratch_bytes(p);
  work.run = [p, memory = vectors.memory, run](int64_t task, void* scratch) { run(p, task, scratch); };
  work.constants = weight.data();
  work.constant_bytes = weight.bytes();
  return {work};
}

double conv2d_winograd_plain_cycles(int64_t n, int64_t out_channels, int64_t p, int64_t q, int64_t in_channels,
                                    int64_t groups) {
  const KernelTable& table = kernels();
  const MachineCosts& costs = table.costs;
  const double width = table.vector_width, slower = costs.winograd.plain;
  constexpr double kThreads = 2;
  constexpr double kThere = 300, kBack = 270;  // of one tile and vector of channels
  constexpr double kStep = 18, kPass = 60;     // of four tiles and six points: a channel, and a pass over 32
  constexpr double kFewTiles = 8;              // of more, weights that were transformed once cost less
  const double tiles = static_cast<double>(n * ceil_div(p, kTile) * ceil_div(q, kTile));
  const double out_vectors = std::ceil(static_cast<double>(out_channels) / width);
  if (PlainWinogradWeight::spans_groups(out_channels, in_channels, groups)) {
    // A tile and vector of channels: the way there and back, and its products; the weights' transform.
    constexpr double kTransforms = 170, kProduct = 0.7, kFormed = 75;
    const double group = static_cast<double>(in_channels / groups);
    const double blocks = std::ceil(tiles / kGroupedTilesPerBlock);
    return slower * out_vectors * (tiles * (kTransforms + 36 * group * kProduct) + blocks * group * kFormed) /
               kThreads +
           costs.phase;
  }
  if (groups == 1 && tiles > kFewTiles) return INFINITY;
  const double in_vectors = std::ceil(static_cast<double>(in_channels) / width);
  const double depth = in_vectors * width / static_cast<double>(groups);
  const double passes = 6 * std::ceil(tiles / 4);
  const double products = slower * out_vectors * passes * (depth * kStep + std::ceil(depth / 32) * kPass) / kThreads;
  const double stream = out_vectors * width * depth * kTaps * 4 / kThreads / costs.far_bytes_per_cycle;
  // Without groups each thread transforms the whole input for itself.
  const double there = kThere * in_vectors / (groups > 1 ? kThreads : 1), back = kBack * out_vectors / kThreads;
  return std::max(products, stream) + std::min(products, stream) / 4 + tiles * (there + back) + costs.phase;
}

}  // namespace fastcnn::cpu
