// Winograd convolution on the CPU: the weights' transform and the work. The arithmetic is in
// isa/conv2d_winograd.cpp, the cut into tasks in conv2d_winograd_cut.cpp.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "conv2d_winograd_cut.h"
#include "isa/conv2d_bf16.h"
#include "isa/table.h"
#include "kernels.h"
#include "parallel.h"
#include "preparation.h"
#include "work.h"

namespace fastcnn::cpu {
namespace {

// G, row by row: the filter polynomial's value at each finite point over the product of its distances to the others;
// at infinity its leading coefficient.
std::vector<double> filter_transform(int side, int filter) {
  const std::vector<double> points =
      side == 6 ? std::vector<double>{0, 0.625, -0.625, 1.5, -1.5} : std::vector<double>{0, 1, -1};
  std::vector<double> rows;
  for (const double p : points) {
    double value = 1;
    for (const double q : points) value /= p == q ? 1 : p - q;
    for (int tap = 0; tap < filter; ++tap, value *= p) rows.push_back(value);
  }
  rows.resize(static_cast<size_t>(side * filter));
  rows.back() = 1;
  return rows;
}

// Ties to even; NaN stays NaN.
uint16_t nearest_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

}  // namespace

PackedConv2dWinogradWeight::PackedConv2dWinogradWeight(DType dtype, int64_t out_channels, int64_t in_channels,
                                                       int filter, int tile)
    : out_channels(out_channels), in_channels(in_channels), filter(filter), tile(tile), data_(nullptr, std::free) {
  const KernelTable& table = kernels();
  bf16_pairs = dtype == DType::bf16 && table.bf16 != nullptr && winograd_by_pairs(in_channels, side());
  channel_vectors = ceil_div(in_channels, bf16_pairs ? 2 * table.vector_width : table.vector_width);
  column_blocks = ceil_div(out_channels, table.column_block);
  bytes_ = column_blocks * side() * side() * channel_vectors * table.vector_width * table.column_block * 4;
  data_.reset(static_cast<float*>(allocate_aligned(bytes_)));
}

void PackedConv2dWinogradWeight::assign(const void* packed) {
  std::memcpy(data_.get(), packed, static_cast<size_t>(bytes_));
}

PackedConv2dWinogradWeight::PackedConv2dWinogradWeight(const void* weight, DType dtype, const int64_t shape[4],
                                                       const int64_t strides[4], int tile)
    : PackedConv2dWinogradWeight(dtype, shape[0], shape[1], static_cast<int>(shape[2]), tile) {
  const KernelTable& table = kernels();
  const int64_t block = table.column_block;
  const int64_t word_channels = bf16_pairs ? 2 : 1;
  const int64_t words = channel_vectors * table.vector_width, channels = words * word_channels;
  const int t = side(), taps = filter;
  const std::vector<double> g = filter_transform(t, taps);
  // A task is one channel of one column block: t*t rows of `block` values, zeros where k or c is beyond the end.
  const auto transform = [&](int64_t task, void* scratch) {
    const int64_t c = task % channels, first = task / channels * block;
    double* values = static_cast<double*>(scratch);  // [r][s][block]
    double* half = values + taps * taps * block;     // [i][s][block]
    std::fill(values, half, 0.0);
    const int64_t columns = c < in_channels ? std::min(block, out_channels - first) : 0;
    for (int64_t k = 0; k < columns; ++k) {
      for (int tap = 0; tap < taps * taps; ++tap) {
        const int64_t from =
            (first + k) * strides[0] + c * strides[1] + tap / taps * strides[2] + tap % taps * strides[3];
        values[tap * block + k] = read_as_float(weight, dtype, from);
      }
    }
    for (int i = 0; i < t; ++i) {
      for (int64_t at = 0; at < taps * block; ++at) {
        double sum = 0;
        for (int r = 0; r < taps; ++r) sum += g[taps * i + r] * values[r * taps * block + at];
        half[taps * i * block + at] = sum;
      }
    }
    float* to = data_.get() + first * t * t * words + c / word_channels * block;
    for (int i = 0; i < t; ++i) {
      const double* row = half + taps * i * block;
      for (int j = 0; j < t; ++j, to += words * block) {
        for (int64_t k = 0; k < block; ++k) {
          double sum = 0;
          for (int s = 0; s < taps; ++s) sum += g[taps * j + s] * row[s * block + k];
          const float value = static_cast<float>(sum);
          if (bf16_pairs) {
            reinterpret_cast<uint16_t*>(to + k)[c % 2] = nearest_bf16(value);
          } else {
            to[k] = value;
          }
        }
      }
    }
  };
  const int64_t scratch_bytes = (taps + t) * taps * block * 8;
  parallel_tasks(column_blocks * channels, default_threads(), scratch_bytes, transform);
}

Works conv2d_winograd_work(const TensorView& out, const TensorView& input, const PackedConv2dWinogradWeight& weight,
                           const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry,
                           int threads, bool max_pool) {
  const KernelTable& table = kernels();
  const int64_t padded = weight.column_blocks * table.column_block;
  const EpilogueVectors vectors(epilogue, 1, weight.out_channels, padded);

  WinogradProblem p;
  p.out = out;
  p.input = input;
  p.pad_top = geometry.pad_top;
  p.pad_left = geometry.pad_left;
  p.tile = weight.tile;
  p.side = weight.side();
  p.packed_weight = weight.data();
  p.channel_vectors = weight.channel_vectors;
  p.column_blocks = weight.column_blocks;
  p.input_scale = prologue.scale;
  p.input_shift = prologue.shift;
  p.input_relu = prologue.relu;
  p.scale = vectors.scale;
  p.bias = vectors.bias;
  p.residual = epilogue.residual;
  p.relu = epilogue.activation == Activation::relu;
  p.max_pool = max_pool;
  p.tiles_h = ceil_div(max_pool ? 2 * out.h : out.h, weight.tile);
  p.tiles_w = ceil_div(max_pool ? 2 * out.w : out.w, weight.tile);
  p.tiles = out.n * p.tiles_h * p.tiles_w;

  const WinogradCut cut =
      cheapest_cut({p.side, p.tiles, p.channel_vectors, p.column_blocks, weight.bf16_pairs}, threads);
  p.tiles_per_block = cut.tiles_per_block;
  p.blocks = ceil_div(p.tiles, p.tiles_per_block);
  p.columns_per_task = cut.columns_per_task;
  Work work;
  work.tasks = p.blocks * ceil_div(p.column_blocks, p.columns_per_task);
  work.threads = cut.threads;
  const auto scratch_bytes = weight.bf16_pairs ? table.bf16->winograd_scratch_bytes : table.winograd_scratch_bytes;
  const auto run_task = weight.bf16_pairs ? table.bf16->winograd_task : table.winograd_task;
  work.scratch_bytes = scratch_bytes(p);
  work.run = [p, memory = vectors.memory, run_task](int64_t task, void* scratch) { run_task(p, task, scratch); };
  work.constants = weight.data();
  work.constant_bytes = weight.bytes();
  return {work};
}

void conv2d_winograd(const TensorView& out, const TensorView& input, const PackedConv2dWinogradWeight& weight,
                     const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry, int threads) {
  run_now(conv2d_winograd_work(out, input, weight, prologue, epilogue, geometry, threads));
}

}  // namespace fastcnn::cpu
