// Packing of short weights and the cut of their layers into tasks. The arithmetic is in isa/linear_short.h.
#include "linear_short.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "isa/conv2d_bf16.h"
#include "isa/table.h"
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

// Four bits for an exponent; -1 for one outside the window.
int code_of(uint32_t exponent, uint32_t first) {
  if (exponent == 0) return 0;
  return exponent >= first && exponent < first + 15 ? static_cast<int>(exponent - first + 1) : -1;
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
  for (uint32_t first = 1; first + 15 <= 256; ++first) {
    int64_t held = 0;
    for (uint32_t e = first; e < first + 15; ++e) held += counts[e];
    if (held >= most) most = held, best = first;  // of equal ones the highest: more room for small values
  }
  return best;
}

// One value in its block.
void put(uint8_t* block, const Format& format, int row, int lane, uint32_t bits, int code) {
  const uint32_t fraction = bits & ((1u << format.fraction_bits) - 1);
  const int width = format.item == 4 ? 3 : 1;  // bytes of a sign and fraction
  const uint32_t value = bits >> (8 * format.item - 1) << format.fraction_bits | fraction;
  uint8_t* to = block + (row * format.lanes + lane) * width;
  for (int i = 0; i < width; ++i) to[i] = static_cast<uint8_t>(value >> (8 * i));
  uint8_t& pair = block[(kLinearShortRows * width + row / 2) * format.lanes + lane];
  pair = static_cast<uint8_t>(pair | code << (row % 2 * 4));
}

}  // namespace

bool reads_short_weights(DType dtype) {
  const KernelTable& table = kernels();
  if (dtype == DType::f32) return table.linear_short_task != nullptr;
  return dtype == DType::bf16 && table.bf16 != nullptr;
}

void ShortLinearWeight::set_sizes() {
  const Format format = format_of(dtype);
  groups_ = ceil_div(columns, kLinearShortRows);
  group_bytes_ = ceil_div(depth, format.lanes) * format.block_bytes;
}

int64_t ShortLinearWeight::blocks_at(int64_t exceptions) const {
  const int64_t before = static_cast<int64_t>(sizeof(Header)) + (groups_ + 1) * 4 +
                         exceptions * static_cast<int64_t>(sizeof(LinearException));
  return ceil_div(before, 64) * 64;
}

ShortLinearWeight::ShortLinearWeight(const TensorView& weight)
    : dtype(weight.dtype), columns(weight.n), depth(weight.c) {
  set_sizes();
  const Format format = format_of(dtype);
  const int threads = default_threads();
  const uint32_t first_exponent = best_window(weight, format, threads);
  std::vector<std::vector<LinearException>> found(static_cast<size_t>(groups_));
  const auto each_value = [&](int64_t group, auto visit) {
    for (int64_t k = group * kLinearShortRows; k < std::min(columns, (group + 1) * kLinearShortRows); ++k) {
      for (int64_t c = 0; c < depth; ++c) {
        const uint32_t bits = bits_of(weight.data, format.item, k * weight.pixel_stride + c);
        visit(static_cast<int>(k % kLinearShortRows), c, bits, code_of(exponent_of(bits, format), first_exponent));
      }
    }
  };
  parallel_tasks(groups_, threads, 0, [&](int64_t group, void*) {
    each_value(group, [&](int row, int64_t c, uint32_t bits, int code) {
      if (code >= 0) return;
      found[static_cast<size_t>(group)].push_back({static_cast<uint32_t>(c / format.lanes), static_cast<uint16_t>(row),
                                                   static_cast<uint16_t>(c % format.lanes), bits});
    });
    std::stable_sort(found[static_cast<size_t>(group)].begin(), found[static_cast<size_t>(group)].end(),
                     [](const LinearException& a, const LinearException& b) { return a.block < b.block; });
  });
  int64_t exceptions = 0;
  for (const auto& of_group : found) exceptions += static_cast<int64_t>(of_group.size());
  bytes_ = blocks_at(exceptions) + groups_ * group_bytes_;
  data_.reset(static_cast<char*>(allocate_aligned(bytes_)), std::free);
  std::memset(data_.get(), 0, static_cast<size_t>(bytes_));
  *reinterpret_cast<Header*>(data_.get()) = {first_exponent, static_cast<uint32_t>(exceptions)};
  auto* first = reinterpret_cast<uint32_t*>(data_.get() + sizeof(Header));
  auto* list = reinterpret_cast<LinearException*>(first + groups_ + 1);
  for (int64_t group = 0; group < groups_; ++group) {
    const auto& of_group = found[static_cast<size_t>(group)];
    std::copy(of_group.begin(), of_group.end(), list + first[group]);
    first[group + 1] = first[group] + static_cast<uint32_t>(of_group.size());
  }
  auto* blocks = reinterpret_cast<uint8_t*>(data_.get() + blocks_at(exceptions));
  parallel_tasks(groups_, threads, 0, [&](int64_t group, void*) {
    each_value(group, [&](int row, int64_t c, uint32_t bits, int code) {
      if (code < 0) return;
      uint8_t* block = blocks + group * group_bytes_ + c / format.lanes * format.block_bytes;
      put(block, format, row, static_cast<int>(c % format.lanes), bits, code);
    });
  });
}

ShortLinearWeight::ShortLinearWeight(DType dtype, int64_t columns, int64_t depth, const void* packed, int64_t bytes)
    : dtype(dtype), columns(columns), depth(depth), bytes_(bytes) {
  set_sizes();
  const auto require = [](bool holds) {
    if (!holds) throw std::invalid_argument("packed must be what a packed weight of this shape gave");
  };
  require(bytes >= blocks_at(0) + groups_ * group_bytes_);
  data_.reset(static_cast<char*>(allocate_aligned(bytes_)), std::free);
  std::memcpy(data_.get(), packed, static_cast<size_t>(bytes_));
  const Header& header = *reinterpret_cast<const Header*>(data_.get());
  require(header.first_exponent >= 1 && header.first_exponent + 15 <= 256);
  require(bytes == blocks_at(header.exceptions) + groups_ * group_bytes_);
  const auto* first = reinterpret_cast<const uint32_t*>(data_.get() + sizeof(Header));
  const auto* list = reinterpret_cast<const LinearException*>(first + groups_ + 1);
  require(first[0] == 0 && first[groups_] == header.exceptions);
  const Format format = format_of(dtype);
  for (int64_t group = 0; group < groups_; ++group) {
    require(first[group] <= first[group + 1] && first[group + 1] <= header.exceptions);
    for (uint32_t i = first[group]; i < first[group + 1]; ++i) {
      require(list[i].row < kLinearShortRows && list[i].lane < format.lanes);
      require(list[i].block < ceil_div(depth, format.lanes));
      require(i == first[group] || list[i - 1].block <= list[i].block);
    }
  }
}

Works linear_short_work(const TensorView& out, const TensorView& input, const ShortLinearWeight& weight,
                        const float* bias, Activation activation, int threads) {
  const KernelTable& table = kernels();
  const char* data = weight.data();
  const auto& header = *reinterpret_cast<const ShortLinearWeight::Header*>(data);
  LinearShortProblem p;
  p.out = out.data, p.out_stride = out.pixel_stride;
  p.input = input.data, p.input_stride = input.pixel_stride;
  p.rows = input.n, p.columns = weight.columns, p.depth = weight.depth;
  p.bias = bias;
  p.relu = activation == Activation::relu;
  p.first_exponent = header.first_exponent;
  p.first_exception = reinterpret_cast<const uint32_t*>(data + sizeof(header));
  p.exceptions = reinterpret_cast<const LinearException*>(p.first_exception + weight.groups_ + 1);
  p.blocks = reinterpret_cast<const uint8_t*>(data + weight.blocks_at(header.exceptions));
  constexpr int64_t kTasksPerThread = 8, kMostGroups = 16;
  p.groups_per_task = std::clamp<int64_t>(weight.groups_ / (kTasksPerThread * threads), 1, kMostGroups);
  Work work;
  work.tasks = ceil_div(weight.groups_, p.groups_per_task);
  work.threads = threads;
  const auto run = weight.dtype == DType::f32 ? table.linear_short_task : table.bf16->linear_short_task;
  work.run = [p, run](int64_t task, void*) { run(p, task); };
  work.constants = p.blocks;
  work.constant_bytes = weight.groups_ * weight.group_bytes_;
  return {work};
}

}  // namespace fastcnn::cpu
