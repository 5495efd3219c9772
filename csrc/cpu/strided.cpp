// Copies and element-wise work on tensors of any strides.
//
//   copy: out[i] = in[i]     map: out[i] = f(a[i], b[i])     sum: out[i] = sum_l in[i, l]
//
// Dimensions are ordered by the output's strides and joined where every operand allows it. The innermost one (J) and
// the one in which the input moves in the smallest steps (I) make a plane; a plane is copied as rows where both sides
// are contiguous along J, else as a transposition. A task owns a range of I of one plane, kValuesPerTask values of it.
// Floor: the bytes of the operands.
#include "strided.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

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

// Calls body(offsets of out, a and b; first, last) for ranges of the second innermost dimension that was chosen.
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
  Works works(int threads, Body body) const {
    int64_t planes = 1;
    for (const Dimension& d : outer) planes *= d.size;
    const int64_t rows = std::clamp<int64_t>(kValuesPerTask / j.size, 1, i.size);
    const int64_t ranges = (i.size + rows - 1) / rows;
    // Several small planes make one task.
    const int64_t units = planes * ranges;
    const int64_t units_per_task = std::clamp<int64_t>(kValuesPerTask / (rows * j.size), 1, units);
    const int64_t tasks = (units + units_per_task - 1) / units_per_task;
    const Planes self = *this;
    return {{tasks, threads, 0, [=](int64_t task, void*) {
               const int64_t end = std::min(units, (task + 1) * units_per_task);
               for (int64_t unit = task * units_per_task; unit < end; ++unit) {
                 std::array<int64_t, 3> at = {0, 0, 0};
                 int64_t plane = unit / ranges;
                 for (auto d = self.outer.rbegin(); d != self.outer.rend(); ++d) {
                   for (int k = 0; k < 3; ++k) at[k] += plane % d->size * d->strides[k];
                   plane /= d->size;
                 }
                 const int64_t first = unit % ranges * rows;
                 body(self, at, first, std::min(self.i.size, first + rows));
               }
             }}};
  }
};

template <typename To, typename From>
Works copy(const Strided& out, const Strided& input, int threads) {
  To* to = static_cast<To*>(out.data);
  const From* from = static_cast<const From*>(input.data);
  return Planes(joined(out, &input, nullptr))
      .works(threads, [to, from](const Planes& p, const std::array<int64_t, 3>& at, int64_t first, int64_t last) {
        const auto move = [](To* y, const From* x) {
          if constexpr (std::is_same_v<To, From>) {
            *y = *x;
          } else {
            store(y, load(x));
          }
        };
        const int64_t yi = p.i.strides[0], xi = p.i.strides[1], yj = p.j.strides[0], xj = p.j.strides[1];
        To* y = to + at[0];
        const From* x = from + at[1];
        if (xj == 1 && yj == 1) {
          for (int64_t i = first; i < last; ++i) {
            if constexpr (std::is_same_v<To, From>) {
              std::memcpy(y + i * yi, x + i * xi, static_cast<size_t>(p.j.size) * sizeof(To));
            } else {
              for (int64_t j = 0; j < p.j.size; ++j) move(y + i * yi + j, x + i * xi + j);
            }
          }
          return;
        }
        constexpr int64_t kTile = 64;  // of I: the lines written stay in L1 while J passes
        for (int64_t i0 = first; i0 < last; i0 += kTile) {
          const int64_t i1 = std::min(last, i0 + kTile);
          for (int64_t j = 0; j < p.j.size; ++j) {
            for (int64_t i = i0; i < i1; ++i) move(y + i * yi + j * yj, x + i * xi + j * xj);
          }
        }
      });
}

template <typename T, typename F>
Works map_values(const Strided& out, const Strided& a, const Strided& b, int threads, F f) {
  T* to = static_cast<T*>(out.data);
  const T* left = static_cast<const T*>(a.data);
  const T* right = static_cast<const T*>(b.data != nullptr ? b.data : a.data);
  return Planes(joined(out, &a, b.data != nullptr ? &b : &a))
      .works(threads, [=](const Planes& p, const std::array<int64_t, 3>& at, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          T* y = to + at[0] + i * p.i.strides[0];
          const T* x = left + at[1] + i * p.i.strides[1];
          const T* z = right + at[2] + i * p.i.strides[2];
          for (int64_t j = 0; j < p.j.size; ++j) {
            store(y + j * p.j.strides[0], f(load(x + j * p.j.strides[1]), load(z + j * p.j.strides[2])));
          }
        }
      });
}

template <typename T>
Works map_of(Map map, const Strided& out, const Strided& a, const Strided& b, int threads) {
  switch (map) {
    case Map::add:
      return map_values<T>(out, a, b, threads, [](float x, float y) { return x + y; });
    case Map::subtract:
      return map_values<T>(out, a, b, threads, [](float x, float y) { return x - y; });
    case Map::multiply:
      return map_values<T>(out, a, b, threads, [](float x, float y) { return x * y; });
    case Map::tanh:
      return map_values<T>(out, a, b, threads, [](float x, float) { return std::tanh(x); });
    case Map::negate:
      return map_values<T>(out, a, b, threads, [](float x, float) { return -x; });
    default:
      return map_values<T>(out, a, b, threads, [](float x, float) { return x * x; });
  }
}

template <typename T>
Works sum_of(const Strided& out, const Strided& input, int threads) {
  const int64_t length = input.shape.back(), stride = input.strides.back();
  Strided rows = input;
  rows.shape.pop_back();
  rows.strides.pop_back();
  T* to = static_cast<T*>(out.data);
  const T* from = static_cast<const T*>(input.data);
  return Planes(joined(out, &rows, nullptr))
      .works(threads, [=](const Planes& p, const std::array<int64_t, 3>& at, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          for (int64_t j = 0; j < p.j.size; ++j) {
            const T* x = from + at[1] + i * p.i.strides[1] + j * p.j.strides[1];
            double sum = 0;
            for (int64_t l = 0; l < length; ++l) sum += load(x + l * stride);
            store(to + at[0] + i * p.i.strides[0] + j * p.j.strides[0], static_cast<float>(sum));
          }
        }
      });
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
    return Planes(joined(out, nullptr, nullptr))
        .works(threads, [=](const Planes& p, const std::array<int64_t, 3>& at, int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            for (int64_t j = 0; j < p.j.size; ++j) store(to + at[0] + i * p.i.strides[0] + j * p.j.strides[0], value);
          }
        });
  };
  return out.dtype == DType::f32 ? fill(static_cast<float*>(out.data)) : fill(static_cast<uint16_t*>(out.data));
}

Works map_work(Map map, const Strided& out, const Strided& a, const Strided& b, int threads) {
  return out.dtype == DType::f32 ? map_of<float>(map, out, a, b, threads) : map_of<uint16_t>(map, out, a, b, threads);
}

Works sum_last_work(const Strided& out, const Strided& input, int threads) {
  return out.dtype == DType::f32 ? sum_of<float>(out, input, threads) : sum_of<uint16_t>(out, input, threads);
}

}  // namespace fastcnn::cpu
