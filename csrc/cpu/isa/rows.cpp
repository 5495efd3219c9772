// Layer normalisation and softmax: functions of whole rows.
//
//   layer_norm:  y[r, c] = (x[r, c] - mean[r]) / sqrt(var[r] + eps) * weight[c] + bias[c]     (biased variance)
//   softmax:     y[r, c] = exp(x[r, c] - max[r]) / sum_c exp(x[r, c] - max[r])
//
// Shapes: rows of `columns` adjacent values, each tensor with its own row stride; weight and bias fp32 or null. In
// channels-last memory a row is a pixel.
//
// Work: a task owns `rows_per_task` rows. A row is read from memory once and then from L1: for its mean, for the sum of
// squares about it (so that no large sums are subtracted), and for the result. Sums are held in fp32 lanes; what the
// mean lost to rounding is found by the second pass and put right.
//
// Floor: bytes of x and y.

#include "math.h"
#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

static inline float lane_sum(Vector v) {
  float sum = 0;
  for (int i = 0; i < kVectorWidth; ++i) sum += v[i];
  return sum;
}

// Lanes of the last vector of a row that lie beyond it hold `fill`.
template <typename T>
static inline Vector tail(const T* p, int64_t count, float fill) {
  Vector v = broadcast(fill);
  for (int64_t i = 0; i < count; ++i) v[i] = load_one(p + i);
  return v;
}

template <typename T>
static void layer_norm_row(const RowsProblem& problem, T* y, const T* x) {
  const int64_t columns = problem.columns, whole = columns / kVectorWidth * kVectorWidth, rest = columns - whole;
  Vector sum{};
  for (int64_t c = 0; c < whole; c += kVectorWidth) sum += load(x + c);
  if (rest > 0) sum += tail(x + whole, rest, 0.0f);
  float mean = lane_sum(sum) / static_cast<float>(columns);
  Vector lost{}, squares{};
  const Vector center = broadcast(mean);
  for (int64_t c = 0; c < whole; c += kVectorWidth) {
    const Vector d = load(x + c) - center;
    lost += d;
    squares += d * d;
  }
  if (rest > 0) {
    const Vector d = tail(x + whole, rest, mean) - center;
    lost += d;
    squares += d * d;
  }
  const float correction = lane_sum(lost) / static_cast<float>(columns);
  const float variance = lane_sum(squares) / static_cast<float>(columns) - correction * correction;
  const Vector factor = broadcast(1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + problem.eps));
  mean += correction;
  const float* weight = problem.weight;
  const float* bias = problem.bias;
  const auto result = [&](Vector value, Vector w, Vector b) {
    value = (value - center - correction) * factor;
    if (weight != nullptr) value *= w;
    return bias != nullptr ? value + b : value;
  };
  for (int64_t c = 0; c < whole; c += kVectorWidth) {
    const Vector w = weight != nullptr ? load(weight + c) : Vector{}, b = bias != nullptr ? load(bias + c) : Vector{};
    store(y + c, result(load(x + c), w, b));
  }
  if (rest > 0) {
    const Vector w = weight != nullptr ? load_some(weight + whole, rest) : Vector{};
    const Vector b = bias != nullptr ? load_some(bias + whole, rest) : Vector{};
    store_some(y + whole, result(load_some(x + whole, rest), w, b), rest);
  }
}

template <typename T>
static void softmax_row(const RowsProblem& problem, T* y, const T* x) {
  const int64_t columns = problem.columns, whole = columns / kVectorWidth * kVectorWidth, rest = columns - whole;
  const float lowest = -__builtin_inff();
  Vector highest = broadcast(lowest);
  // A NaN becomes the maximum and stays it.
  const auto raise = [&](Vector v) { highest = (v > highest) | (v != v) ? v : highest; };
  for (int64_t c = 0; c < whole; c += kVectorWidth) raise(load(x + c));
  if (rest > 0) raise(tail(x + whole, rest, lowest));
  float most = highest[0];
  for (int i = 1; i < kVectorWidth; ++i) most = highest[i] > most || highest[i] != highest[i] ? highest[i] : most;
  const Vector top = broadcast(most);
  Vector sum{};
  for (int64_t c = 0; c < whole; c += kVectorWidth) sum += exp(load(x + c) - top);
  if (rest > 0) sum += exp(tail(x + whole, rest, lowest) - top);
  const Vector total = broadcast(lane_sum(sum));
  for (int64_t c = 0; c < whole; c += kVectorWidth) store(y + c, exp(load(x + c) - top) / total);
  if (rest > 0) store_some(y + whole, exp(load_some(x + whole, rest) - top) / total, rest);
}

template <typename T>
static void run(const RowsProblem& problem, int64_t index) {
  const int64_t first = index * problem.rows_per_task;
  const int64_t last = first + problem.rows_per_task < problem.rows ? first + problem.rows_per_task : problem.rows;
  for (int64_t row = first; row < last; ++row) {
    T* y = static_cast<T*>(problem.out) + row * problem.out_stride;
    const T* x = static_cast<const T*>(problem.input) + row * problem.input_stride;
    problem.kind == RowsKind::layer_norm ? layer_norm_row(problem, y, x) : softmax_row(problem, y, x);
  }
}

}  // namespace

void rows_task(const RowsProblem& problem, int64_t index) {
  problem.dtype == DType::f32 ? run<float>(problem, index) : run<uint16_t>(problem, index);
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
