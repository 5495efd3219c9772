// Convolution on the CPU: weight packing and the cut into tasks. The arithmetic is in isa/conv2d.cpp.
#include <algorithm>
#include <cstring>
#include <memory>

#include "conv2d_bf16.h"
#include "isa/table.h"
#include "kernels.h"
#include "preparation.h"
#include "work.h"

namespace fastcnn::cpu {
PackedConv2dWeight::PackedConv2dWeight(DType dtype, const int64_t shape[4], int64_t groups)
    : out_channels(shape[0]),
      in_channels(shape[1] * groups),
      filter_h(shape[2]),
      filter_w(shape[3]),
      groups(groups),
      group_in(shape[1]),
      group_out(shape[0] / groups),
      data_(nullptr, std::free) {
  const KernelTable& table = kernels();
  const bool power_of_two = (group_in & (group_in - 1)) == 0;
  // Groups of a whole vector: enough pixels in registers hide the latency of their sums, and no permutation is needed.
  const bool whole_vector = group_in == table.vector_width && table.micro_rows >= 8 && dtype == DType::f32;
  spans_groups = groups > 1 && group_in == group_out && power_of_two && group_in <= table.vector_width && !whole_vector;
  const int64_t block = spans_groups ? table.vector_width : table.column_block;
  const int64_t taps = filter_h * filter_w;
  const int64_t reduction = taps * group_in;
  bf16_pairs = dtype == DType::bf16 && table.bf16 != nullptr && !(spans_groups && group_in == 1);
  column_blocks = ceil_div(spans_groups ? out_channels : group_out, block);
  bytes_ = (spans_groups ? 1 : groups) * column_blocks * reduction * block * 4;
  if (bf16_pairs && spans_groups) {
    bytes_ /= 2;
  } else if (bf16_pairs) {
    column_blocks = bf16_column_blocks(group_out);
    bytes_ = groups * column_blocks * filter_h * bf16_row_values(filter_w, group_in) * kBf16ColumnBlock * 2;
  }
  data_.reset(static_cast<float*>(allocate_aligned(bytes_)));
  std::memset(data_.get(), 0, static_cast<size_t>(bytes_));
}

void PackedConv2dWeight::assign(const void* packed) {
  std::memcpy(data_.get(), packed, static_cast<size_t>(bytes_));
}

PackedConv2dWeight::PackedConv2dWeight(const void* weight, DType dtype, const int64_t shape[4],
                                       const int64_t strides[4], int64_t groups)
    : PackedConv2dWeight(dtype, shape, groups) {
  if (bf16_pairs) {
    pack_bf16_pairs(*this, static_cast<const uint16_t*>(weight), strides, reinterpret_cast<uint16_t*>(data_.get()));
    return;
  }
  // Where the element (k, tap, c) goes: see the two kernels.
  const KernelTable& table = kernels();
  const int64_t block = spans_groups ? table.vector_width : table.column_block;
  const int64_t taps = filter_h * filter_w;
  const int64_t reduction = taps * group_in;
  for (int64_t k = 0; k < out_channels; ++k) {
    const int64_t group = spans_groups ? 0 : k / group_out;
    const int64_t column = spans_groups ? k : k % group_out;
    float* to = data_.get() + (group * column_blocks + column / block) * reduction * block + column % block;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t from = k * strides[0] + tap / filter_w * strides[2] + tap % filter_w * strides[3];
      for (int64_t c = 0; c < group_in; ++c) {
        to[(tap * group_in + c) * block] = read_as_float(weight, dtype, from + c * strides[1]);
      }
    }
  }
}

namespace {

constexpr int64_t kStripBytes = 512 << 10;

// Of output pixels, in a task.
int64_t max_micro_tiles() {
  return ceil_div(kMaxTaskPixels, kernels().micro_rows);
}

// Where the inner loop reads its input. Pixels a multiple of 4 KiB apart would meet in one set of L1, which holds fewer
// lines than a micro-tile has rows.
void choose_source(Conv2dProblem& problem) {
  const KernelTable& table = kernels();
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& out = problem.out;
  const auto one_set = [](int64_t stride) { return stride * 4 % 4096 == 0; };
  problem.source = ConvSource::panel;
  if (g.filter_h * g.filter_w == 1) {
    const bool same_pixels = g.stride_h == 1 && g.stride_w == 1 && g.pad_top == 0 && g.pad_left == 0 &&
                             out.h == problem.input.h && out.w == problem.input.w;
    problem.prefetch_input = same_pixels;
    if (same_pixels && problem.input.dtype == DType::f32 && !problem.has_prologue() &&
        !one_set(problem.input.pixel_stride)) {
      problem.source = ConvSource::in_place;
    }
    return;
  }
  const int64_t width = problem.convolved(out.w);
  problem.strip_pixels = (width - 1) * g.stride_w + g.filter_w;
  problem.strip_pitch = ceil_div(problem.strip_pixels * problem.group_in, 16) * 16 + 16;
  // A micro-tile's pixels lie in one output row: narrow rows leave registers empty.
  const int64_t row_tiles = ceil_div(width, table.micro_rows);
  const bool fits = problem.input_rows(1) * problem.strip_pitch * 4 <= kStripBytes && row_tiles <= max_micro_tiles() &&
                    3 * width >= 2 * row_tiles * table.micro_rows;
  if (fits && g.dilation_w == 1 && !one_set(g.stride_w * problem.group_in)) {
    problem.source = ConvSource::strip;
    problem.prefetch_input = true;
  }
}

// Whether isa/conv2d_narrow.h serves a problem: few channels out, into memory without gaps.
bool is_narrow(const Conv2dProblem& problem) {
  const KernelTable& table = kernels();
  const int64_t reduction = problem.geometry.filter_h * problem.geometry.filter_w * problem.group_in;
  return table.permutes && problem.source == ConvSource::strip && problem.geometry.groups == 1 &&
         problem.group_out <= narrow_channels(table.vector_width) && problem.out.pixel_stride == problem.group_out &&
         problem.out.dtype == DType::f32 && !problem.residual && reduction <= table.max_chunk;
}

// Whether isa/conv2d_row_pairs.h serves a problem's column blocks of one vector: output rows share input rows, and a
// reduction is one chunk.
bool has_row_pairs(const Conv2dProblem& problem) {
  const KernelTable& table = kernels();
  const Conv2dGeometry& g = problem.geometry;
  const int64_t last = problem.group_out % table.column_block;
  return problem.source == ConvSource::strip && last > 0 && last <= table.vector_width && g.dilation_h == 1 &&
         g.filter_h > g.stride_h && g.filter_h * g.filter_w * problem.group_in <= table.max_chunk;
}

// The same where all that is computed is pooled: into one vector of fp32 channels.
bool pools_row_pairs(const Conv2dProblem& problem) {
  return has_row_pairs(problem) && problem.group_out <= kernels().vector_width && problem.geometry.groups == 1 &&
         problem.out.dtype == DType::f32 && !problem.residual;
}

// [vector of the output][pair of channels][lane]: which lane of the two channels' pixels goes there, or none.
std::shared_ptr<uint32_t> narrow_lanes(const Conv2dProblem& problem) {
  const int64_t channels = problem.group_out, width = kernels().vector_width;
  std::shared_ptr<uint32_t> memory(
      static_cast<uint32_t*>(allocate_aligned(channels * ceil_div(channels, 2) * width * 4)), std::free);
  uint32_t* to = memory.get();
  for (int64_t vector = 0; vector < channels; ++vector) {
    for (int64_t pair = 0; pair < ceil_div(channels, 2); ++pair) {
      for (int64_t lane = 0; lane < width; ++lane, ++to) {
        const int64_t value = vector * width + lane, channel = value % channels;
        *to = channel / 2 == pair ? static_cast<uint32_t>(channel % 2 * width + value / channels) : ~uint32_t{0};
      }
    }
  }
  return memory;
}

// How many pixels and column blocks a task owns: the cut whose last thread is done first, by an estimate in cycles. A
// task of few column blocks brings its pixels for little work, and tasks that do not divide evenly among the threads
// leave one of them waiting.
int64_t cut_dense(Conv2dProblem& problem, int threads) {
  const KernelTable& table = kernels();
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& out = problem.out;
  const bool strip = problem.source == ConvSource::strip, narrow = is_narrow(problem);
  const int64_t reduction = g.filter_h * g.filter_w * problem.group_in;
  const int64_t chunks = ceil_div(reduction, table.max_chunk);
  problem.chunk = std::min<int64_t>(ceil_div(ceil_div(reduction, chunks), 16) * 16, table.max_chunk);
  constexpr int64_t kL2Bytes = 512 << 10;
  constexpr double kTaskCycles = 1000;
  constexpr int64_t kMostTiles = 8;          // of pixels that are no strip
  constexpr double kLaterBytesPerCycle = 8;  // of weights that are not in L2
  const double vector_cycles = problem.source == ConvSource::in_place ? 0 : problem.has_prologue() ? 5 : 3;
  // Units of pixels that a task is made of: output rows of a strip, else micro-tiles.
  const int64_t row_tiles = ceil_div(problem.convolved(out.w), table.micro_rows);
  const int64_t units = strip ? out.h : ceil_div(out.pixels(), table.micro_rows);
  const int64_t most_units = narrow  ? 2 * table.micro_rows
                             : strip ? std::max<int64_t>(1, max_micro_tiles() / row_tiles)
                                     : kMostTiles;
  double best = 0;
  int64_t tasks = 0;
  for (int64_t wanted = 1; wanted <= std::min(most_units, units); ++wanted) {
    int64_t rows, row_tasks;
    double pixels, brought;  // a task's output pixels, and the vectors that it must bring
    if (strip) {
      rows = ceil_div(out.h, ceil_div(out.h, wanted));
      row_tasks = out.n * ceil_div(out.h, rows);
      const int64_t input_rows = problem.input_rows(rows);
      if (wanted > 1 && input_rows * problem.strip_pitch * 4 > kStripBytes) continue;
      pixels = static_cast<double>(problem.convolved(rows) * problem.convolved(out.w));
      brought = static_cast<double>(input_rows) * problem.strip_pitch / table.vector_width;
    } else {
      rows = ceil_div(out.pixels(), ceil_div(units, wanted));
      row_tasks = ceil_div(out.pixels(), rows);
      pixels = static_cast<double>(rows);
      brought = static_cast<double>(rows) * reduction / table.vector_width;
    }
    for (int64_t blocks = 1; blocks <= problem.column_blocks; ++blocks) {
      const int64_t column_tasks = ceil_div(problem.column_blocks, blocks);
      if (ceil_div(problem.column_blocks, column_tasks) != blocks) continue;  // the same number in less equal parts
      const double weight_bytes = static_cast<double>(blocks) * reduction * table.column_block * 4;
      const double products = pixels * blocks * reduction * (narrow ? 0.5 : 1);
      const double stream = weight_bytes > kL2Bytes ? weight_bytes / kLaterBytesPerCycle : 0;
      const double task = std::max(products, stream) + brought * vector_cycles + kTaskCycles;
      const int64_t count = row_tasks * column_tasks * g.groups;
      const double cost = task * ceil_div(count, threads);
      if (tasks == 0 || cost < best) {
        best = cost;
        tasks = count;
        problem.tile_rows = rows;
        problem.row_tasks = row_tasks;
        problem.blocks_per_task = blocks;
      }
    }
  }
  // Where no thread has a second task, the next one's pixels are for another core; and of the next rows a group reads
  // but its own channels.
  problem.prefetch_input &=
      g.groups == 1 && tasks > threads && problem.blocks_per_task * reduction * table.column_block * 4 <= kL2Bytes;
  return tasks;
}

// As many output rows as leave the strip in L1 (of wide pictures, a few: its rows overlap the next task's), and vectors
// of channels until a task is worth its beginning.
int64_t cut_grouped(Conv2dProblem& problem, int threads) {
  constexpr int64_t kStripBytes = 40 << 10, kFewRows = 4, kTaskProducts = 20000, kTasksPerThread = 4;
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& out = problem.out;
  const int64_t width = kernels().vector_width;
  problem.strip_pixels = (out.w - 1) * g.stride_w + (g.filter_w - 1) * g.dilation_w + 1;
  problem.strip_pitch = problem.strip_pixels * width;
  int64_t rows = std::min(kFewRows, out.h);
  while (rows < out.h && problem.input_rows(rows + 1) * problem.strip_pitch * 4 <= kStripBytes) ++rows;
  const int64_t strips = ceil_div(out.h, rows);
  problem.tile_rows = ceil_div(out.h, strips);
  const int64_t products = problem.tile_rows * out.w * g.filter_h * g.filter_w * problem.group_in;
  const int64_t most = out.n * strips * problem.column_blocks / (kTasksPerThread * threads);
  problem.blocks_per_task = std::clamp<int64_t>(std::min(kTaskProducts / products, most), 1, problem.column_blocks);
  return out.n * ceil_div(out.h, problem.tile_rows) * ceil_div(problem.column_blocks, problem.blocks_per_task);
}

}  // namespace

bool conv2d_may_pool(const TensorView& out, const TensorView& input, const PackedConv2dWeight& weight,
                     const Conv2dGeometry& geometry) {
  if (weight.bf16_pairs || weight.spans_groups) return false;
  Conv2dProblem problem{};
  problem.out = out;
  problem.input = input;
  problem.geometry = geometry;
  problem.group_in = weight.group_in;
  problem.group_out = weight.group_out;
  problem.max_pool = true;
  choose_source(problem);
  return is_narrow(problem) || pools_row_pairs(problem);
}

Works conv2d_work(const TensorView& out, const TensorView& input, const PackedConv2dWeight& weight,
                  const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry, int threads,
                  bool max_pool) {
  if (weight.bf16_pairs) return conv2d_bf16_work(out, input, weight, prologue, epilogue, geometry, threads);
  const KernelTable& table = kernels();
  const int64_t groups = weight.spans_groups ? 1 : weight.groups;
  const int64_t group_out = weight.out_channels / groups;
  const int64_t padded = weight.column_blocks * (weight.spans_groups ? table.vector_width : table.column_block);
  const EpilogueVectors vectors(epilogue, groups, group_out, padded);

  Conv2dProblem problem{};
  set_operands(problem, out, input, prologue, epilogue, vectors);
  problem.geometry = geometry;
  problem.packed_weight = weight.data();
  problem.group_in = weight.group_in;
  problem.group_out = weight.group_out;
  problem.column_blocks = weight.column_blocks;
  problem.max_pool = max_pool;

  constexpr int64_t kSerialWork = 1 << 18;  // multiplications not worth waking a thread for
  const int64_t pixels = out.pixels() * (max_pool ? 4 : 1);
  if (pixels * weight.out_channels * weight.group_in * weight.filter_h * weight.filter_w <= kSerialWork) {
    threads = 1;
  }
  Work work;
  work.threads = threads;
  work.constants = weight.data();
  work.constant_bytes = weight.bytes();
  if (weight.spans_groups) {
    work.tasks = cut_grouped(problem, threads);
    work.scratch_bytes = table.conv2d_grouped_scratch_bytes(problem);
    work.run = [problem, memory = vectors.memory, &table](int64_t task, void* scratch) {
      table.conv2d_grouped_task(problem, task, scratch);
    };
  } else {
    choose_source(problem);
    work.tasks = cut_dense(problem, threads);
    std::shared_ptr<uint32_t> lanes;
    if (is_narrow(problem)) problem.narrow_lanes = (lanes = narrow_lanes(problem)).get();
    problem.row_pairs = has_row_pairs(problem);
    work.scratch_bytes = table.conv2d_scratch_bytes(problem);
    work.run = [problem, memory = vectors.memory, lanes, &table](int64_t task, void* scratch) {
      table.conv2d_task(problem, task, scratch);
    };
  }
  return {work};
}

void conv2d(const TensorView& out, const TensorView& input, const PackedConv2dWeight& weight, const Prologue& prologue,
            const Epilogue& epilogue, const Conv2dGeometry& geometry, int threads) {
  run_now(conv2d_work(out, input, weight, prologue, epilogue, geometry, threads));
}

}  // namespace fastcnn::cpu
