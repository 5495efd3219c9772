// Winograd convolution on the CPU: the weights' transform and the work. The arithmetic is in
// isa/conv2d_winograd.cpp, the cut into tasks in conv2d_winograd_cut.cpp.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "conv2d_winograd_cut.h"
#include "conv2d_winograd_filter.h"
#include "isa/conv2d_bf16.h"
#include "isa/table.h"
#include "kernels.h"
#include "parallel.h"
#include "preparation.h"
#include "work.h"

namespace fastcnn::cpu {
namespace {

// Ties to even; NaN stays NaN.
uint16_t nearest_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

}  // namespace

PackedConv2dWinogradWeight::PackedConv2dWinogradWeight(DType dtype, int64_t out_channels, int64_t in_channels,
                                                       int filter, int tile, int stride)
    : out_channels(out_channels),
      in_channels(in_channels),
      filter(filter),
      stride(stride),
      tile(tile),
      bf16_pairs(dtype == DType::bf16 && winograd_by_pairs(in_channels, filter, tile, stride)),
      phases(filter, stride, in_channels, bf16_pairs ? 2 : 1),
      data_(nullptr, std::free) {
  const KernelTable& table = kernels();
  column_blocks = ceil_div(out_channels, table.column_block);
  const int t = side();
  point_words_.push_back(0);
  for (int point = 0; point < t * t; ++point) {
    point_words_.push_back(point_words_.back() + phases.words(point / t == t - 1, point % t == t - 1));
  }
  bytes_ = column_blocks * point_words_.back() * table.column_block * 4;
  data_.reset(static_cast<float*>(allocate_aligned(bytes_)));
}

bool PackedConv2dWinogradWeight::may_pool(int64_t height, int64_t width) const {
  // Of two tiles that are an output short the second begins within a window.
  return short_tiles(height, tile, side()) <= 1 && short_tiles(width, tile, side()) <= 1;
}

void PackedConv2dWinogradWeight::assign(const void* packed) {
  std::memcpy(data_.get(), packed, static_cast<size_t>(bytes_));
}

PackedConv2dWinogradWeight::PackedConv2dWinogradWeight(const void* weight, DType dtype, const int64_t shape[4],
                                                       const int64_t strides[4], int tile, int stride)
    : PackedConv2dWinogradWeight(dtype, shape[0], shape[1], static_cast<int>(shape[2]), tile, stride) {
  const KernelTable& table = kernels();
  const int64_t block = table.column_block, lanes = table.vector_width;
  const int t = side(), taps = phases.taps();
  const std::vector<double> g = winograd_filter_transform(t, taps);
  // Which row of a point's weights is a word's; -1: none.
  std::vector<int64_t> ranks[4];
  for (int at = 0; at < 4; ++at) {
    ranks[at].assign(static_cast<size_t>(phases.vectors() * lanes), -1);
    int64_t rank = 0;
    for (const WinogradRun& run : phases.runs(at / 2, at % 2)) {
      for (int lane = 0; lane < run.count; ++lane) ranks[at][run.vector * lanes + run.first + lane] = rank++;
    }
  }
  // A task is one word of one column block: at each point a row of `block` values, zeros where k is beyond the end.
  const auto transform = [&](int64_t task, void* scratch) {
    const int64_t at = task % (phases.vectors() * lanes), first = task / (phases.vectors() * lanes) * block;
    const WinogradPhases::Word word = phases.word(at / lanes, at % lanes);
    double* values = static_cast<double*>(scratch);  // [r][s][block]
    double* half = values + taps * taps * block;     // [i][s][block]
    const int64_t columns = std::min(block, out_channels - first);
    float* to = data_.get() + first * point_words_.back();
    for (int64_t part = 0; part < (word.count == 0 ? 0 : bf16_pairs ? 2 : 1); ++part) {
      std::fill(values, half, 0.0);
      for (int64_t k = 0; part < word.count && k < columns; ++k) {
        for (int tap = 0; tap < taps * taps; ++tap) {
          const int r = tap / taps * stride + word.row, s = tap % taps * stride + word.column;
          if (r >= filter || s >= filter) continue;
          const int64_t from =
              (first + k) * strides[0] + (word.channel + part) * strides[1] + r * strides[2] + s * strides[3];
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
      for (int i = 0; i < t; ++i) {
        const double* row = half + taps * i * block;
        for (int j = 0; j < t; ++j) {
          const int64_t rank = ranks[2 * (i == t - 1) + (j == t - 1)][at];
          if (rank < 0) continue;
          float* place = to + (point_words_[i * t + j] + rank) * block;
          for (int64_t k = 0; k < block; ++k) {
            double sum = 0;
            for (int s = 0; s < taps; ++s) sum += g[taps * j + s] * row[s * block + k];
            const float value = static_cast<float>(sum);
            if (bf16_pairs) {
              reinterpret_cast<uint16_t*>(place + k)[part] = nearest_bf16(value);
            } else {
              place[k] = value;
            }
          }
        }
      }
    }
  };
  const int64_t scratch_bytes = (taps + t) * taps * block * 8;
  parallel_tasks(column_blocks * phases.vectors() * lanes, default_threads(), scratch_bytes, transform);
}

Works conv2d_winograd_work(const TensorView& out, const TensorView& input, const PackedConv2dWinogradWeight& weight,
                           const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry,
                           int threads, bool max_pool) {
  const KernelTable& table = kernels();
  const int64_t padded = weight.column_blocks * table.column_block;
  const EpilogueVectors vectors(epilogue, 1, weight.out_channels, padded);

  WinogradProblem p;
  set_operands(p, out, input, prologue, epilogue, vectors);
  p.pad_top = geometry.pad_top;
  p.pad_left = geometry.pad_left;
  p.tile = weight.tile;
  p.side = weight.side();
  p.stride = weight.stride;
  p.packed_weight = weight.data();
  p.channel_vectors = weight.phases.vectors();
  p.rows_per_vector = weight.phases.rows_per_vector();
  for (int at = 0; at < 4; ++at) {
    const std::vector<WinogradRun>& runs = weight.phases.runs(at / 2, at % 2);
    p.runs[at] = {runs.data(), static_cast<int64_t>(runs.size())};
  }
  p.point_words = weight.point_words().data();
  p.column_blocks = weight.column_blocks;
  p.max_pool = max_pool;
  const int64_t out_h = max_pool ? 2 * out.h : out.h, out_w = max_pool ? 2 * out.w : out.w;  // before pooling
  p.tiles_h = ceil_div(out_h, weight.tile);
  p.tiles_w = ceil_div(out_w, weight.tile);
  p.tiles = out.n * p.tiles_h * p.tiles_w;
  if (!max_pool) {  // windows lie in tiles that begin at whole ones' places
    p.short_h = short_tiles(out.h, weight.tile, p.side);
    p.short_w = short_tiles(out.w, weight.tile, p.side);
  }

  const WinogradCut cut = cheapest_cut(winograd_sizes(out.n, out_h, out_w, p.column_blocks, weight.phases, p.tile,
                                                      p.stride, weight.bf16_pairs, max_pool),
                                       threads);
  p.tiles_per_block = cut.tiles_per_block;
  p.blocks = ceil_div(p.tiles, p.tiles_per_block);
  p.columns_per_task = cut.columns_per_task;
  p.columns_at_once = cut.columns_at_once;
  Work work;
  work.tasks = p.blocks * ceil_div(p.column_blocks, p.columns_per_task);
  work.threads = cut.threads;
  p.one_task_each = work.tasks <= cut.threads;
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
