// Winograd convolution along rows on the CPU: the weights' transform, the cut into tasks and what it costs
// (isa/costs.h). The arithmetic is in isa/conv2d_winograd_rows.cpp.
#include "conv2d_winograd_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "conv2d_winograd_filter.h"
#include "isa/table.h"
#include "preparation.h"

namespace fastcnn::cpu {
namespace {

struct Sizes {
  int64_t n, p, q, column_blocks;
  int filter, stride, side;
  int64_t words, all_words;                // of a filter row; of all points
  int64_t block = kernels().column_block;  // channels of a column block that are computed
  int64_t unit = 1;                        // rows that stay together
};

struct Cut {
  int threads = 1;
  int64_t rows_per_task = 0, columns_per_task = 0, rows_at_once = 0, columns_at_once = 1;
  double cycles = 0;  // estimated, of the busiest thread
};

Cut cut_of(const Sizes& sizes, int threads, int64_t rows, int64_t columns) {
  const KernelTable& table = kernels();
  const MachineCosts& costs = table.costs;
  Cut cut;
  cut.threads = threads;
  cut.rows_per_task = rows;
  cut.columns_per_task = columns;
  const int64_t tiles = ceil_div(sizes.q, winograd_row_tile(sizes.stride));
  const double weight_bytes = static_cast<double>(columns * sizes.all_words * table.column_block * 4);
  const int64_t row_bytes = tiles * sizes.side * sizes.block * 4;
  // Where the weights stay in L2, the products of a few rows, that they too are near; else as few passes over the
  // weights as there can be.
  const bool weights_stay = weight_bytes < costs.rows.l2 - costs.rows.panel_bytes;
  const int64_t sum_bytes = static_cast<int64_t>(costs.rows.sum_bytes);
  const int64_t least = ceil_div(table.micro_rows, tiles);
  cut.rows_at_once = weights_stay ? std::min(rows, std::max<int64_t>(least, sum_bytes / 2 / row_bytes)) : rows;
  cut.rows_at_once = ceil_div(cut.rows_at_once, sizes.unit) * sizes.unit;
  cut.columns_at_once = std::clamp<int64_t>(2 * sum_bytes / (cut.rows_at_once * row_bytes), 1, columns);

  const int64_t blocks = sizes.n * ceil_div(sizes.p, rows), parts = ceil_div(sizes.column_blocks, columns);
  const int64_t input_rows = (rows - 1) * sizes.stride + sizes.filter;
  const int64_t vectors = ceil_div(sizes.words, table.vector_width);
  const int64_t pitch = table.vector_width == 16 && sizes.words <= 8 ? 8 : table.vector_width;
  const double panel_bytes = static_cast<double>(input_rows * tiles * vectors * pitch * sizes.side * 4);
  if (rows > 1 && panel_bytes > costs.rows.panel_bytes) return cut;  // with 0 cycles: none
  const int64_t count = cut.rows_at_once * tiles, micro_tiles = ceil_div(count, table.micro_rows);
  const int64_t passes = ceil_div(rows, cut.rows_at_once);
  const double words = static_cast<double>(sizes.all_words);
  const double chunks = std::ceil(words / static_cast<double>(sizes.side) / 40);
  const double products = static_cast<double>(passes * columns * sizes.block) /
                          static_cast<double>(table.column_block) *
                          (words * static_cast<double>(std::max(count, 4 * micro_tiles)) * costs.rows.product +
                           costs.rows.micro_tile * static_cast<double>(micro_tiles * sizes.side) * chunks);
  const double again = weights_stay ? 0 : 1 / costs.near_bytes_per_cycle;
  const double per_thread = static_cast<double>(ceil_div(blocks * parts, threads));
  const double stream = weight_bytes * (1 / costs.far_bytes_per_cycle + (per_thread - 1) * again) / per_thread;
  const double there =
      costs.rows.there * static_cast<double>(input_rows * tiles * vectors * pitch) / table.vector_width;
  const double back = costs.rows.back * static_cast<double>(rows * tiles * columns * sizes.block) / table.vector_width;
  const double task = std::max(products, stream) + std::min(products, stream) / 4 + there + back + costs.task;
  cut.cycles = per_thread * task + (threads > 1 ? costs.phase : 0);
  return cut;
}

// serial: work too small to be cut, where looking for the best cut would take longer than it saves.
Cut cheapest_cut(const Sizes& sizes, int threads, bool serial = false) {
  Cut best;
  if (serial) best = cut_of(sizes, 1, ceil_div(sizes.p, sizes.unit) * sizes.unit, sizes.column_blocks);
  if (best.cycles > 0) return best;
  const auto consider = [&](int team, int64_t rows, int64_t columns) {
    const Cut cut = cut_of(sizes, team, rows, columns);
    if (cut.cycles > 0 && (best.cycles == 0 || cut.cycles < best.cycles)) best = cut;
  };
  for (int64_t blocks = 1; blocks <= sizes.p; ++blocks) {
    const int64_t rows = ceil_div(ceil_div(sizes.p, blocks), sizes.unit) * sizes.unit;
    consider(1, rows, sizes.column_blocks);
    if (threads == 1) continue;
    for (int64_t parts = 1; parts <= std::min<int64_t>(sizes.column_blocks, threads); ++parts) {
      consider(threads, rows, ceil_div(sizes.column_blocks, parts));
    }
  }
  return best;
}

// Outputs of at most a vector of channels leave half of their column block out.
int64_t computed_channels(int64_t out_channels, int stride) {
  const KernelTable& table = kernels();
  return stride == 1 && out_channels <= table.vector_width ? table.vector_width : table.column_block;
}

Sizes sizes_of(const RowWinogradWeight& weight, int64_t n, int64_t p, int64_t q, int64_t unit) {
  return {n,
          p,
          q,
          weight.column_blocks,
          weight.filter,
          weight.stride,
          weight.side,
          weight.words,
          weight.all_words,
          computed_channels(weight.out_channels, weight.stride),
          unit};
}

}  // namespace

bool RowWinogradWeight::covers(int64_t filter, int stride) {
  return (stride == 1 && filter == 5) || (stride >= 2 && stride <= 4 && filter > stride && filter <= 4 * stride);
}

RowWinogradWeight::RowWinogradWeight(int64_t out_channels, int64_t in_channels, int filter, int stride)
    : out_channels(out_channels),
      in_channels(in_channels),
      filter(filter),
      stride(stride),
      taps(static_cast<int>(ceil_div(filter, stride))),
      side(taps + winograd_row_tile(stride) - 1),
      words(stride * in_channels),
      last_words((filter - (taps - 1) * stride) * in_channels),
      all_words(filter * ((side - 1) * words + last_words)),
      column_blocks(ceil_div(out_channels, kernels().column_block)),
      data_(nullptr, std::free) {
  bytes_ = column_blocks * all_words * kernels().column_block * 4;
  data_.reset(static_cast<float*>(allocate_aligned(bytes_)));
}

void RowWinogradWeight::assign(const void* packed) {
  std::memcpy(data_.get(), packed, static_cast<size_t>(bytes_));
}

RowWinogradWeight::RowWinogradWeight(const void* weight, DType dtype, const int64_t shape[4], const int64_t strides[4],
                                     int stride)
    : RowWinogradWeight(shape[0], shape[1], static_cast<int>(shape[2]), stride) {
  const int64_t block = kernels().column_block;
  const std::vector<double> g = winograd_filter_transform(side, taps);
  // A task is one filter row of one column block.
  const auto transform = [&](int64_t task, void*) {
    const int64_t r = task % filter, first = task / filter * block;
    for (int64_t word = 0; word < words; ++word) {
      const int64_t phase = word / in_channels, c = word % in_channels;
      for (int64_t k = 0; k < block; ++k) {
        double values[5] = {};
        for (int tap = 0; tap < taps; ++tap) {
          const int64_t s = tap * this->stride + phase;
          if (first + k >= out_channels || s >= filter) continue;
          const int64_t from = (first + k) * strides[0] + c * strides[1] + r * strides[2] + s * strides[3];
          values[tap] = read_as_float(weight, dtype, from);
        }
        for (int point = 0; point < side; ++point) {
          const int64_t row_words = point == side - 1 ? last_words : words;
          if (word >= row_words) continue;
          double sum = 0;
          for (int tap = 0; tap < taps; ++tap) sum += g[point * taps + tap] * values[tap];
          const int64_t at = point * filter * words + r * row_words + word;
          data_.get()[(first / block * all_words + at) * block + k] = static_cast<float>(sum);
        }
      }
    }
  };
  parallel_tasks(column_blocks * filter, default_threads(), 0, transform);
}

Works conv2d_winograd_rows_work(const TensorView& out, const TensorView& input, const RowWinogradWeight& weight,
                                const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry,
                                int threads, bool max_pool) {
  const KernelTable& table = kernels();
  const EpilogueVectors vectors(epilogue, 1, weight.out_channels, weight.column_blocks * table.column_block);
  const int64_t unit = max_pool ? 2 : 1, height = unit * out.h, width = unit * out.w;
  constexpr int64_t kSerialWork = 1 << 18;  // the plain sum's multiplications, not worth waking a thread for
  const int64_t taps = weight.filter * weight.filter * weight.in_channels;
  const bool serial = weight.stride == 1 && out.n * height * width * weight.out_channels * taps <= kSerialWork;
  if (serial) threads = 1;

  WinogradRowsProblem p{};
  set_operands(p, out, input, prologue, epilogue, vectors);
  p.pad_top = geometry.pad_top;
  p.pad_left = geometry.pad_left;
  p.filter = weight.filter;
  p.stride = weight.stride;
  p.side = weight.side;
  p.words = weight.words;
  p.last_words = weight.last_words;
  p.packed_weight = weight.data();
  p.column_blocks = weight.column_blocks;
  p.max_pool = max_pool;
  p.tiles = ceil_div(width, winograd_row_tile(weight.stride));

  const Cut cut = cheapest_cut(sizes_of(weight, out.n, height, width, unit), threads, serial);
  p.rows_per_task = cut.rows_per_task;
  p.blocks_per_image = ceil_div(height, p.rows_per_task);
  p.columns_per_task = cut.columns_per_task;
  p.rows_at_once = cut.rows_at_once;
  p.columns_at_once = cut.columns_at_once;
  Work work;
  work.tasks = out.n * p.blocks_per_image * ceil_div(p.column_blocks, p.columns_per_task);
  work.threads = cut.threads;
  work.scratch_bytes = table.winograd_rows_scratch_bytes(p);
  work.run = [p, memory = vectors.memory, &table](int64_t task, void* scratch) {
    table.winograd_rows_task(p, task, scratch);
  };
  work.constants = weight.data();
  work.constant_bytes = weight.bytes();
  return {work};
}

double conv2d_winograd_rows_cycles(int64_t n, int64_t out_channels, int64_t p, int64_t q, int64_t in_channels,
                                   int filter, int stride) {
  constexpr int kThreads = 2;
  const int64_t taps = ceil_div(filter, stride), side = taps + winograd_row_tile(stride) - 1,
                words = stride * in_channels;
  const int64_t last_words = (filter - (taps - 1) * stride) * in_channels;
  const Sizes sizes = {n,
                       p,
                       q,
                       ceil_div(out_channels, kernels().column_block),
                       filter,
                       stride,
                       static_cast<int>(side),
                       words,
                       filter * ((side - 1) * words + last_words),
                       computed_channels(out_channels, stride)};
  return cheapest_cut(sizes, kThreads).cycles;
}

}  // namespace fastcnn::cpu
