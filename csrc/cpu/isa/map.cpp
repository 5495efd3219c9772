// Functions of one value or two: activations, sums, products.
//
//   y[i, j] = f(a[i, j])   or   y[i, j] = f(a[i, j], b[i, j])
//
// Shapes: rows i of columns j, each tensor with its own two strides; a stride of 0 broadcasts. What the functions are:
// table.h.
//
// Work: the caller cuts tensors into such blocks (../strided.cpp). Each value is read once, computed in fp32 in a
// register, and rounded once. Columns that are adjacent, or one value for all, are read as vectors; others lane by
// lane.
//
// Floor: bytes of a, b and y; exp and its like cost about 20 operations a vector.

#include "math.h"
#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

template <typename T>
static inline Vector read(const T* p, int64_t stride) {
  if (stride == 1) return load(p);
  if (stride == 0) return broadcast(load_one(p));
  Vector v;
  for (int i = 0; i < kVectorWidth; ++i) v[i] = load_one(p + i * stride);
  return v;
}

template <typename T>
static inline Vector read_some(const T* p, int64_t stride, int64_t count) {
  if (stride == 1) return load_some(p, count);
  Vector v{};
  for (int64_t i = 0; i < count; ++i) v[i] = load_one(p + i * stride);
  return v;
}

template <typename T, bool Binary, typename F>
static void run(const MapProblem& problem, F f) {
  const int64_t columns = problem.columns, ys = problem.out_column, as = problem.a_column, bs = problem.b_column;
  for (int64_t row = 0; row < problem.rows; ++row) {
    T* y = static_cast<T*>(problem.out) + row * problem.out_row;
    const T* a = static_cast<const T*>(problem.a) + row * problem.a_row;
    const T* b = Binary ? static_cast<const T*>(problem.b) + row * problem.b_row : nullptr;
    int64_t j = 0;
    for (; j + kVectorWidth <= columns; j += kVectorWidth) {
      const Vector value = f(read(a + j * as, as), Binary ? read(b + j * bs, bs) : Vector{});
      if (ys == 1) {
        store(y + j, value);
      } else {
        for (int i = 0; i < kVectorWidth; ++i) store_one(y + (j + i) * ys, value[i]);
      }
    }
    if (j == columns) continue;
    const int64_t rest = columns - j;
    const Vector value = f(read_some(a + j * as, as, rest), Binary ? read_some(b + j * bs, bs, rest) : Vector{});
    if (ys == 1) {
      store_some(y + j, value, rest);
    } else {
      for (int64_t i = 0; i < rest; ++i) store_one(y + (j + i) * ys, value[i]);
    }
  }
}

template <typename T>
static void run(const MapProblem& p) {
  const float alpha = p.alpha, beta = p.beta;
  const auto unary = [&](auto f) { run<T, false>(p, [=](Vector x, Vector) { return f(x); }); };
  const auto binary = [&](auto f) { run<T, true>(p, f); };
  switch (p.map) {
    case Map::add:
      return binary([=](Vector x, Vector z) { return x + z * alpha; });
    case Map::subtract:
      return binary([=](Vector x, Vector z) { return x - z * alpha; });
    case Map::multiply:
      return binary([](Vector x, Vector z) { return x * z; });
    case Map::divide:
      return binary([](Vector x, Vector z) { return x / z; });
    case Map::maximum:
      return binary([](Vector x, Vector z) { return (x > z) | (x != x) ? x : z; });
    case Map::minimum:
      return binary([](Vector x, Vector z) { return (x < z) | (x != x) ? x : z; });
    case Map::negate:
      return unary([](Vector x) { return -x; });
    case Map::absolute:
      return unary([](Vector x) { return absolute(x); });
    case Map::square:
      return unary([](Vector x) { return x * x; });
    case Map::sqrt:
      return unary([](Vector x) { return square_root(x); });
    case Map::rsqrt:
      return unary([](Vector x) { return 1.0f / square_root(x); });
    case Map::reciprocal:
      return unary([](Vector x) { return 1.0f / x; });
    case Map::exp:
      return unary([](Vector x) { return exp(x); });
    case Map::tanh:
      return unary([](Vector x) { return tanh(x); });
    case Map::sigmoid:
      return unary([](Vector x) { return sigmoid(x); });
    case Map::silu:
      return unary([](Vector x) { return x / (1.0f + exp(-x)); });
    case Map::hardsigmoid:
      return unary([](Vector x) { return clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f; });
    case Map::hardswish:
      return unary([](Vector x) { return x * (clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f); });
    case Map::gelu:
      return unary([](Vector x) { return 0.5f * x * (1.0f + erf(x * 0.707106781f)); });
    case Map::gelu_tanh:
      return unary([](Vector x) { return 0.5f * x * (1.0f + tanh(0.797884561f * (x + 0.044715f * x * x * x))); });
    case Map::mish:
      // tanh(log(1 + n)) = n (n + 2) / (n (n + 2) + 2) with n = exp(x); above 20 it rounds to 1.
      return unary([](Vector x) {
        const Vector n = exp(at_most(x, broadcast(20.0f))), m = n * (n + 2.0f);
        return x > broadcast(20.0f) ? x : x * (m / (m + 2.0f));
      });
    case Map::clamp:
      return unary([=](Vector x) { return clamp(x, alpha, beta); });
    case Map::leaky_relu:
      return unary([=](Vector x) { return x > Vector{} ? x : x * alpha; });
    case Map::elu:
      return unary([=](Vector x) { return x > Vector{} ? x * beta : expm1(x) * alpha; });
  }
}

}  // namespace

void map_block(const MapProblem& problem) {
  problem.dtype == DType::f32 ? run<float>(problem) : run<uint16_t>(problem);
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
