// Copies and element-wise work on tensors of any strides.
//
//   copy: out[i] = in[i]     map: out[i] = f(a[i], b[i])     reduction: out[i] = factor * sum_l in[i, l]
//
// Dimensions are ordered by the output's strides and joined where every operand allows it. The innermost one (J) and
// the one in which the input moves in the smallest steps (I) make a plane; a plane is copied as rows where both sides
// are contiguous along J, else as a transposition. A plane is cut into blocks of at most kValuesPerTask values, whole
// rows where they are not longer than that; a task owns a block, or several that are small. Maps are computed by
// isa/map.cpp.
// Floor: the bytes of the operands.
#include "strided.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "preparation.h"

namespace fastcnn::cpu {
namespace {

constexpr int64_t kValuesPerTask = 1 << 14;

struct Dimension {
  int64_t size;
  std::array<int64_t, 3> strides;  // of out, a and b
};

float load(const float* p) {
  return *p;
}
float load(const uint16_t* p) {
  const uint32_t word = static_cast<uint32_t>(*p) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
void store(float* p, float value) {
  *p = value;
}
void store(uint16_t* p, float value) {  // to nearest, ties to even; a NaN stays one
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (value != value) {
    *p = static_cast<uint16_t>(word >> 16 | 0x40);
    return;
  }
  *p = static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// The dimensions that matter, outermost first: never empty.
std::vector<Dimension> joined(const Strided& out, const Strided* a, const Strided* b) {
  std::vector<Dimension> all;
  for (size_t i = 0; i < out.shape.size(); ++i) {
    if (out.shape[i] == 1) continue;
    all.push_back({out.shape[i], {out.strides[i], a ? a->strides[i] : 0, b ? b->strides[i] : 0}});
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const Dimension& x, const Dimension& y) { return x.strides[0] > y.strides[0]; });
  std::vector<Dimension> result;
  for (const Dimension& d : all) {
    bool joins = !result.empty();
    for (int i = 0; joins && i < 3; ++i) joins = result.back().strides[i] == d.strides[i] * d.size;
    if (joins) {
      result.back().size *= d.size;
      result.back().strides = d.strides;
    } else {
      result.push_back(d);
    }
  }
  if (result.empty()) result.push_back({1, {1, 1, 1}});
  return result;
}

// A part of a plane: rows [i0, i1) of I and columns [j0, j1) of J. `at`: where out, a and b start.
struct Block {
  std::array<int64_t, 3> at;
  int64_t i0, i1, j0, j1;
};

// Calls body(planes, block) for all blocks. `cost`: how many values are read for one that is written.
struct Planes {
  std::vector<Dimension> outer;
  Dimension i, j;

  explicit Planes(std::vector<Dimension> dimensions) {
    j = dimensions.back();
    dimensions.pop_back();
    i = {1, {0, 0, 0}};
    if (!dimensions.empty()) {
      auto smallest = std::min_element(dimensions.rbegin(), dimensions.rend(), [](const auto& x, const auto& y) {
        return std::abs(x.strides[1]) < std::abs(y.strides[1]);
      });
      if (j.strides[1] == 1) smallest = dimensions.rbegin();  // rows: the nearest ones
      i = *smallest;
      dimensions.erase(std::next(smallest).base());
    }
    outer = dimensions;
  }

  template <typename Body>
  Works works(int threads, Body body, int64_t cost = 1) const {
    const int64_t limit = std::max<int64_t>(kValuesPerTask / cost, 1);
    int64_t planes = 1;
    for (const Dimension& d : outer) planes *= d.size;
    const int64_t columns = std::min(j.size, limit), rows = std::clamp<int64_t>(limit / columns, 1, i.size);
    const int64_t across = ceil_div(j.size, columns), down = ceil_div(i.size, rows);
    const int64_t blocks = planes * down * across;
    const int64_t blocks_per_task = std::clamp<int64_t>(limit / (rows * columns), 1, blocks);
    const Planes self = *this;
    return {{ceil_div(blocks, blocks_per_task), threads, 0, [=](int64_t task, void*) {
               const int64_t end = std::min(blocks, (task + 1) * blocks_per_task);
               for (int64_t index = task * blocks_per_task; index < end; ++index) {
                 const int64_t i0 = index / across % down * rows, j0 = index % across * columns;
                 Block block = {
                     {0, 0, 0}, i0, std::min(self.i.size, i0 + rows), j0, std::min(self.j.size, j0 + columns)};
                 int64_t plane = index / across / down;
                 for (auto d = self.outer.rbegin(); d != self.outer.rend(); ++d) {
                   for (int k = 0; k < 3; ++k) block.at[k] += plane % d->size * d->strides[k];
                   plane /= d->size;
                 }
                 body(self, block);
               }
             }}};
  }
};

// Rows of few bytes: a call of memcpy for each takes longer than the copying.
template <int64_t Bytes>
void copy_rows(char* to, int64_t to_row, const char* from, int64_t from_row, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * to_row, from + i * from_row, Bytes);
}

void copy_rows(char* to, int64_t to_row, const char* from, int64_t from_row, int64_t rows, int64_t bytes) {
  if (bytes == 64) return copy_rows<64>(to, to_row, from, from_row, rows);
  if (bytes == 128) return copy_rows<128>(to, to_row, from, from_row, rows);
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(to + i * to_row, from + i * from_row, static_cast<size_t>(bytes));
  }
}

// An image's three planes as pixels: y[i][j] = x[j][i] with three values to a pixel.
template <typename T>
void interleave_three(T* __restrict y, const T* __restrict x, int64_t plane, int64_t pixels) {
  const T *red = x, *green = x + plane, *blue = x + 2 * plane;
  for (int64_t i = 0; i < pixels; ++i, y += 3) y[0] = red[i], y[1] = green[i], y[2] = blue[i];
}

template <typename To, typename From>
Works copy(const Strided& out, const Strided& input, int threads) {
  To* to = static_cast<To*>(out.data);
  const From* from = static_cast<const From*>(input.data);
  return Planes(joined(out, &input, nullptr)).works(threads, [to, from](const Planes& p, const Block& block) {
    const auto move = [](To* y, const From* x) {
      if constexpr (std::is_same_v<To, From>) {
        *y = *x;
      } else {
        store(y, load(x));
      }
    };
    const int64_t yi = p.i.strides[0], xi = p.i.strides[1], yj = p.j.strides[0], xj = p.j.strides[1];
    To* y = to + block.at[0];
    const From* x = from + block.at[1];
    constexpr int64_t kItem = sizeof(To);
    if (xj == 1 && yj == 1) {
      if constexpr (std::is_same_v<To, From>) {
        copy_rows(reinterpret_cast<char*>(y + block.i0 * yi + block.j0), yi * kItem,
                  reinterpret_cast<const char*>(x + block.i0 * xi + block.j0), xi * kItem, block.i1 - block.i0,
                  (block.j1 - block.j0) * kItem);
      } else {
        for (int64_t i = block.i0; i < block.i1; ++i) {
          for (int64_t j = block.j0; j < block.j1; ++j) move(y + i * yi + j, x + i * xi + j);
        }
      }
      return;
    }
    if constexpr (std::is_same_v<To, From>) {
      if (block.j0 == 0 && block.j1 == 3 && yj == 1 && yi == 3 && xi == 1) {
        return interleave_three(y + block.i0 * 3, x + block.i0, xj, block.i1 - block.i0);
      }
    }
    constexpr int64_t kTile = 64;  // of I: the lines written stay in L1 while J passes
    for (int64_t i0 = block.i0; i0 < block.i1; i0 += kTile) {
      const int64_t i1 = std::min(block.i1, i0 + kTile);
      for (int64_t j = block.j0; j < block.j1; ++j) {
        for (int64_t i = i0; i < i1; ++i) move(y + i * yi + j * yj, x + i * xi + j * xj);
      }
    }
  });
}

// The sum or the largest of `length` values; a NaN among them is the result.
template <typename T>
float reduced(Reduction reduction, const T* x, int64_t length, int64_t stride) {
  if (reduction == Reduction::max) {
    float most = load(x);
    for (int64_t l = 1; l < length; ++l) {
      const float value = load(x + l * stride);
      if (value > most || value != value) most = value;
    }
    return most;
  }
  // Several sums side by side: one would wait for each addition.
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t l = 0;
  for (; l + kSums <= length; l += kSums) {
    for (int k = 0; k < kSums; ++k) sums[k] += load(x + (l + k) * stride);
  }
  for (; l < length; ++l) sums[0] += load(x + l * stride);
  double sum = 0;
  for (const double part : sums) sum += part;
  return static_cast<float>(sum);
}

template <typename T>
Works reduce_of(Reduction reduction, const Strided& out, const Strided& input, float factor, int threads) {
  const int64_t length = input.shape.back(), stride = input.strides.back();
  Strided rows = input;
  rows.shape.pop_back();
  rows.strides.pop_back();
  T* to = static_cast<T*>(out.data);
  const T* from = static_cast<const T*>(input.data);
  const auto body = [=](const Planes& p, const Block& block) {
    for (int64_t i = block.i0; i < block.i1; ++i) {
      for (int64_t j = block.j0; j < block.j1; ++j) {
        const T* x = from + block.at[1] + i * p.i.strides[1] + j * p.j.strides[1];
        store(to + block.at[0] + i * p.i.strides[0] + j * p.j.strides[0],
              reduced(reduction, x, length, stride) * factor);
      }
    }
  };
  return Planes(joined(out, &rows, nullptr)).works(threads, body, length);
}

}  // namespace

Works copy_work(const Strided& out, const Strided& input, int threads) {
  const bool to_float = out.dtype == DType::f32, from_float = input.dtype == DType::f32;
  if (to_float)
    return from_float ? copy<float, float>(out, input, threads) : copy<float, uint16_t>(out, input, threads);
  return from_float ? copy<uint16_t, float>(out, input, threads) : copy<uint16_t, uint16_t>(out, input, threads);
}

Works fill_work(const Strided& out, float value, int threads) {
  const auto fill = [&](auto* to) {
    return Planes(joined(out, nullptr, nullptr)).works(threads, [=](const Planes& p, const Block& block) {
      const int64_t step = p.j.strides[0], count = block.j1 - block.j0;
      std::remove_reference_t<decltype(*to)> bits{};
      store(&bits, value);
      for (int64_t i = block.i0; i < block.i1; ++i) {
        auto* row = to + block.at[0] + i * p.i.strides[0] + block.j0 * step;
        if (step == 1) {
          std::fill_n(row, count, bits);
        } else {
          for (int64_t j = 0; j < count; ++j) row[j * step] = bits;
        }
      }
    });
  };
  return out.dtype == DType::f32 ? fill(static_cast<float*>(out.data)) : fill(static_cast<uint16_t*>(out.data));
}

Works map_work(Map map, float alpha, float beta, const Strided& out, const Strided& a, const Strided& b, int threads) {
  const bool binary = b.data != nullptr;
  const KernelTable& table = kernels();
  return Planes(joined(out, &a, binary ? &b : &a))
      .works(threads, [=, &table, y = out.data, x = a.data, z = b.data](const Planes& p, const Block& block) {
        const int64_t item = size_in_bytes(out.dtype);
        const auto at = [&](void* data, int k) {
          return static_cast<char*>(data) +
                 (block.at[k] + block.i0 * p.i.strides[k] + block.j0 * p.j.strides[k]) * item;
        };
        MapProblem problem = {map, out.dtype, alpha, beta, at(y, 0), at(x, 1), binary ? at(z, 2) : nullptr, {}, {},
                              {},  {},        {},    {},   {},       {}};
        problem.rows = block.i1 - block.i0, problem.columns = block.j1 - block.j0;
        problem.out_row = p.i.strides[0], problem.a_row = p.i.strides[1], problem.b_row = p.i.strides[2];
        problem.out_column = p.j.strides[0], problem.a_column = p.j.strides[1], problem.b_column = p.j.strides[2];
        table.map_block(problem);
      });
}

Works reduce_last_work(Reduction reduction, const Strided& out, const Strided& input, float factor, int threads) {
  return out.dtype == DType::f32 ? reduce_of<float>(reduction, out, input, factor, threads)
                                 : reduce_of<uint16_t>(reduction, out, input, factor, threads);
}

}  // namespace fastcnn::cpu
