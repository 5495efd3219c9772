// Packing of short weights and the cut of their layers into tasks. The arithmetic is in isa/linear_short.h and
// isa/linear_by_input.cpp.
#include "linear_short.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "isa/conv2d_bf16.h"
#include "isa/table.h"
#include "linear_by_input.h"
#include "preparation.h"

namespace fastcnn::cpu {
namespace {

struct Format {
  int lanes, block_bytes, fraction_bits, item;
};

Format format_of(DType dtype) {
  if (dtype == DType::f32) return {kLinearShortLanes, kLinearShortBlockBytes, 23, 4};
  return {kLinearShortBf16Lanes, kLinearShortBf16BlockBytes, 7, 2};
}

uint32_t bits_of(const void* data, int item, int64_t index) {
  if (item == 4) return static_cast<const uint32_t*>(data)[index];
  return static_cast<const uint16_t*>(data)[index];
}

uint32_t exponent_of(uint32_t bits, const Format& format) {
  return bits >> format.fraction_bits & 255;
}

bool in_words(DType dtype) {
  return dtype == DType::f32 && kernels().short_format == ShortFormat::words;
}

// Four bits for a value's exponent; -1 for one outside the window, and for a denormal that lies in words: decoding
// multiplies it.
int code_of(uint32_t bits, const Format& format, uint32_t first, bool words) {
  const uint32_t exponent = exponent_of(bits, format);
  if (exponent == 0) return words && bits << 1 != 0 ? -1 : 0;
  return exponent >= first && exponent < first + 15 ? static_cast<int>(exponent - first + 1) : -1;
}

// A window's highest first exponent; of words, that whose factor (isa/short_words.h) is finite.
uint32_t last_window(DType dtype) {
  return in_words(dtype) ? 128 : 256 - 15;
}

// The window of 15 exponents that holds most values.
uint32_t best_window(const TensorView& weight, const Format& format, int threads) {
  std::vector<int64_t> counts(256 * static_cast<size_t>(threads), 0);
  const int64_t part = ceil_div(weight.n, threads);
  parallel_tasks(threads, threads, 0, [&](int64_t task, void*) {
    int64_t* own = counts.data() + 256 * task;
    for (int64_t k = task * part; k < std::min(weight.n, (task + 1) * part); ++k) {
      for (int64_t c = 0; c < weight.c; ++c) {
        ++own[exponent_of(bits_of(weight.data, format.item, k * weight.pixel_stride + c), format)];
      }
    }
  });
  for (size_t i = 256; i < counts.size(); ++i) counts[i % 256] += counts[i];
  uint32_t best = 1;
  int64_t most = -1;
  for (uint32_t first = 1; first <= last_window(weight.dtype); ++first) {
    int64_t held = 0;
    for (uint32_t e = first; e < first + 15; ++e) held += counts[e];
    if (held >= most) most = held, best = first;  // of equal ones the highest: more room for small values
  }
  return best;
}

constexpr int64_t kLeastBlockColumns = 512, kBlocks = 2;  // by input

// As measured: of words, rows of 7 KiB come faster than ones of half as much.
int64_t most_block_columns() {
  return kernels().short_format == ShortFormat::words ? 2048 : 1024;
}

int64_t units_of(int64_t columns) {
  return ceil_div(columns, linear_unit_columns(kernels().short_format));
}

void require(bool holds) {
  if (!holds) throw std::invalid_argument("packed must be what a packed weight of this shape gave");
}

}  // namespace

bool reads_short_weights(DType dtype) {
  const KernelTable& table = kernels();
  if (dtype == DType::f32) return table.short_format != ShortFormat::none;
  return dtype == DType::bf16 && table.bf16 != nullptr;
}

// ---- where a value lies
// -----------------------------------------------------------------------------------------------

// Within a group of columns.
struct ShortLinearWeight::Place {
  int64_t block;
  int row, lane;  // of the block; by input, a row is a vector of columns
};

void ShortLinearWeight::set_places() {
  lanes_ = format_of(dtype).lanes;
  group_columns_ = kLinearShortRows;
  if (layout == ShortLayout::by_output) return;
  const ShortFormat format = kernels().short_format;
  lanes_ = linear_vector_lanes(format);
  // As long as they can be, so that memory is read in long runs, and some for threads to share.
  const int64_t blocks =
      std::max(ceil_div(columns, most_block_columns()), std::min(kBlocks, ceil_div(columns, kLeastBlockColumns)));
  group_columns_ = units_of(ceil_div(columns, blocks)) * linear_unit_columns(format);
  int64_t position = 0;
  for (int64_t i = 0; i < lanes_; ++i) {
    const int64_t lane = kLinearLaneOrder[i] * lanes_ / 16;
    first_position_[lane] = position;
    position += std::max<int64_t>(0, ceil_div(depth - lane, lanes_));
  }
}

int64_t ShortLinearWeight::groups() const {
  return ceil_div(columns, group_columns_);
}

int64_t ShortLinearWeight::block_bytes(int64_t group) const {
  if (layout == ShortLayout::by_output) return format_of(dtype).block_bytes;
  return units_of(std::min(group_columns_, columns - group * group_columns_)) *
         linear_unit_bytes(kernels().short_format);
}

int64_t ShortLinearWeight::blocks_in_group() const {
  return layout == ShortLayout::by_output ? ceil_div(depth, format_of(dtype).lanes) : depth;
}

int64_t ShortLinearWeight::blocks_bytes() const {
  const int64_t last = groups() - 1;
  return (last * block_bytes(0) + block_bytes(last)) * blocks_in_group();
}

int64_t ShortLinearWeight::blocks_at(int64_t exceptions) const {
  const int64_t before = static_cast<int64_t>(sizeof(Header)) + (groups() + 1) * 4 +
                         exceptions * static_cast<int64_t>(sizeof(LinearException));
  return ceil_div(before, 64) * 64;
}

ShortLinearWeight::Place ShortLinearWeight::place_of(int64_t column, int64_t value) const {
  const int64_t within = column % group_columns_;
  if (layout == ShortLayout::by_output) {
    return {value / lanes_, static_cast<int>(within), static_cast<int>(value % lanes_)};
  }
  const int64_t position = first_position_[value % lanes_] + value / lanes_;
  return {position, static_cast<int>(within / lanes_), static_cast<int>(within % lanes_)};
}

// One value of a unit of words: isa/short_words.h.
void ShortLinearWeight::put_in_words(uint8_t* unit, int vector, int lane, uint32_t bits, int code) {
  auto* words = reinterpret_cast<uint32_t*>(unit) + lane;
  const uint32_t fraction = bits & 0x7fffffu, sign = bits >> 31, exponent = static_cast<uint32_t>(code) << 23;
  if (vector < 7) {
    words[8 * vector] |= sign << 31 | exponent | fraction;
    return;
  }
  const uint32_t value = sign << 27 | exponent | fraction;
  for (int i = 0; i < 7; ++i) words[8 * i] |= (value >> (4 * i) & 15) << 27;
}

// One value among its group's blocks, which have `block_bytes` bytes each.
void ShortLinearWeight::put(uint8_t* blocks, int64_t block_bytes, const Place& place, uint32_t bits, int code) const {
  if (in_words(dtype)) {
    uint8_t* block = blocks + place.block * block_bytes;
    if (layout == ShortLayout::by_input) {
      put_in_words(block + place.row / 8 * linear_unit_bytes(ShortFormat::words), place.row % 8, place.lane, bits,
                   code);
    } else {
      put_in_words(block, place.lane / 8 * kLinearShortRows + place.row, place.lane % 8, bits, code);
    }
    return;
  }
  const Format format = format_of(dtype);
  const int width = format.item == 4 ? 3 : 1;  // bytes of a sign and fraction
  const uint32_t fraction = bits & ((1u << format.fraction_bits) - 1);
  const uint32_t value = bits >> (8 * format.item - 1) << format.fraction_bits | fraction;
  uint8_t* block = blocks + place.block * block_bytes;
  int row = place.row, rows = kLinearShortRows;  // rows: whose exponents lie behind their fractions
  if (layout == ShortLayout::by_input) {
    block += row / 2 * linear_unit_bytes(ShortFormat::bytes);
    row %= 2, rows = 2;
  }
  uint8_t* to = block + (row * format.lanes + place.lane) * width;
  for (int i = 0; i < width; ++i) to[i] = static_cast<uint8_t>(value >> (8 * i));
  uint8_t& pair = block[(rows * width + row / 2) * format.lanes + place.lane];
  pair = static_cast<uint8_t>(pair | code << (row % 2 * 4));
}

// ---- packing
// ----------------------------------------------------------------------------------------------------------

ShortLinearWeight::ShortLinearWeight(const TensorView& weight, ShortLayout layout)
    : dtype(weight.dtype), columns(weight.n), depth(weight.c), layout(layout) {
  const Format format = format_of(dtype);
  if (layout == ShortLayout::by_input && dtype != DType::f32) {
    throw std::invalid_argument("weight must be float32 where it is stored by input");
  }
  set_places();
  const int threads = default_threads();
  const uint32_t first_exponent = best_window(weight, format, threads);
  const bool words = in_words(dtype);
  std::vector<std::vector<LinearException>> found(static_cast<size_t>(groups()));
  std::atomic<bool> finite{true};
  const auto each_value = [&](int64_t group, auto visit) {
    for (int64_t k = group * group_columns_; k < std::min(columns, (group + 1) * group_columns_); ++k) {
      for (int64_t c = 0; c < depth; ++c) {
        const uint32_t bits = bits_of(weight.data, format.item, k * weight.pixel_stride + c);
        visit(k, c, bits, code_of(bits, format, first_exponent, words));
      }
    }
  };
  parallel_tasks(groups(), threads, 0, [&](int64_t group, void*) {
    auto& list = found[static_cast<size_t>(group)];
    each_value(group, [&](int64_t k, int64_t c, uint32_t bits, int code) {
      if (code >= 0) return;
      const Place place = place_of(k, c);
      if (exponent_of(bits, format) == 255) finite = false;
      list.push_back({static_cast<uint32_t>(place.block), static_cast<uint16_t>(place.row),
                      static_cast<uint16_t>(place.lane), bits});
    });
    std::stable_sort(list.begin(), list.end(),
                     [](const LinearException& a, const LinearException& b) { return a.block < b.block; });
  });
  if (layout == ShortLayout::by_input && !finite) {
    throw std::invalid_argument("weight must be finite where it is stored by input");
  }
  int64_t exceptions = 0;
  for (const auto& of_group : found) exceptions += static_cast<int64_t>(of_group.size());
  bytes_ = blocks_at(exceptions) + blocks_bytes();
  data_.reset(static_cast<char*>(allocate_aligned(bytes_)), std::free);
  std::memset(data_.get(), 0, static_cast<size_t>(bytes_));
  *reinterpret_cast<Header*>(data_.get()) = {first_exponent, static_cast<uint32_t>(exceptions)};
  auto* first = reinterpret_cast<uint32_t*>(data_.get() + sizeof(Header));
  auto* list = reinterpret_cast<LinearException*>(first + groups() + 1);
  for (int64_t group = 0; group < groups(); ++group) {
    const auto& of_group = found[static_cast<size_t>(group)];
    std::copy(of_group.begin(), of_group.end(), list + first[group]);
    first[group + 1] = first[group] + static_cast<uint32_t>(of_group.size());
  }
  auto* blocks = reinterpret_cast<uint8_t*>(data_.get() + blocks_at(exceptions));
  parallel_tasks(groups(), threads, 0, [&](int64_t group, void*) {
    uint8_t* of_group = blocks + group * blocks_in_group() * block_bytes(0);
    const int64_t bytes = block_bytes(group);
    each_value(group, [&](int64_t k, int64_t c, uint32_t bits, int code) {
      if (code >= 0) put(of_group, bytes, place_of(k, c), bits, code);
    });
  });
}

ShortLinearWeight::ShortLinearWeight(DType dtype, int64_t columns, int64_t depth, ShortLayout layout,
                                     const void* packed, int64_t bytes)
    : dtype(dtype), columns(columns), depth(depth), layout(layout), bytes_(bytes) {
  require(layout == ShortLayout::by_output || dtype == DType::f32);
  set_places();
  require(bytes >= blocks_at(0) + blocks_bytes());
  data_.reset(static_cast<char*>(allocate_aligned(bytes_)), std::free);
  std::memcpy(data_.get(), packed, static_cast<size_t>(bytes_));
  require(header().first_exponent >= 1 && header().first_exponent <= last_window(dtype));
  require(bytes == blocks_at(header().exceptions) + blocks_bytes());
  const uint32_t* first = first_exception();
  const auto* list = reinterpret_cast<const LinearException*>(exceptions());
  require(first[0] == 0 && first[groups()] == header().exceptions);
  const int64_t rows = layout == ShortLayout::by_output ? kLinearShortRows : group_columns_ / lanes_;
  for (int64_t group = 0; group < groups(); ++group) {
    require(first[group] <= first[group + 1] && first[group + 1] <= header().exceptions);
    for (uint32_t i = first[group]; i < first[group + 1]; ++i) {
      require(list[i].row < rows && list[i].lane < lanes_ && list[i].block < blocks_in_group());
      require(i == first[group] || list[i - 1].block <= list[i].block);
    }
  }
}

// ---- the work
// ---------------------------------------------------------------------------------------------------------

Works linear_short_work(const TensorView& out, const TensorView& input, const ShortLinearWeight& weight,
                        const float* bias, Activation activation, int threads) {
  if (weight.layout == ShortLayout::by_input) {
    return linear_by_input_work(out, input, weight, bias, activation, threads);
  }
  const KernelTable& table = kernels();
  LinearShortProblem p;
  p.out = out.data, p.out_stride = out.pixel_stride;
  p.input = input.data, p.input_stride = input.pixel_stride;
  p.rows = input.n, p.columns = weight.columns, p.depth = weight.depth;
  p.bias = bias;
  p.relu = activation == Activation::relu;
  p.first_exponent = weight.header().first_exponent;
  p.first_exception = weight.first_exception();
  p.exceptions = reinterpret_cast<const LinearException*>(weight.exceptions());
  p.blocks = weight.blocks();
  constexpr int64_t kTasksPerThread = 8, kMostGroups = 16;
  p.groups_per_task = std::clamp<int64_t>(weight.groups() / (kTasksPerThread * threads), 1, kMostGroups);
  Work work;
  work.tasks = ceil_div(weight.groups(), p.groups_per_task);
  work.threads = threads;
  const auto run = weight.dtype == DType::f32 ? table.linear_short_task : table.bf16->linear_short_task;
  work.run = [p, run](int64_t task, void*) { run(p, task); };
  work.constants = p.blocks;
  work.constant_bytes = weight.blocks_bytes();
  return {work};
}

}  // namespace fastcnn::cpu
