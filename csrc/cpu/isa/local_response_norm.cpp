// Local response normalisation across channels on the CPU (AlexNet, section 3.3, in PyTorch's form).
//
//   y[m, c] = x[m, c] / d^beta,  d = k + alpha/size * sum_{j = c - size/2}^{c + (size-1)/2} x[m, j]^2, outside = 0
//
// x, y: channels-last with pixel strides, m = (n, h, w), fp32 or bf16; arithmetic in fp32.
//
// Work: a task owns `pixels_per_task` pixels and takes them in groups of kPixels: first the squares of the group go
// into scratch, each pixel's with zeros on both sides, then every vector of channels adds up the `size` shifted vectors
// of squares. (A group rather than a pixel, so that the stores have left the store buffer when shifted loads ask for
// them.) Nothing is carried from channel to channel: a NaN or infinity reaches the windows that hold it and no other.
//
// d^beta for beta = 3/4, the usual value, is sqrt(d) * sqrt(sqrt(d)); other exponents go through powf.
//
// Kept in registers: one window's sum. In L1: the group's squares.
// Floor: one read of x, one write of y.

#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int64_t kPixels = 8;

static int64_t padded_row(const LocalResponseNormProblem& problem) {
  const int64_t whole = (problem.input.c + kVectorWidth - 1) / kVectorWidth * kVectorWidth;
  return (whole + problem.size + kVectorWidth - 1) / kVectorWidth * kVectorWidth;
}

static inline Vector square_root(Vector v) {
  for (int i = 0; i < kVectorWidth; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}

static inline Vector three_quarters(Vector d) {
  const Vector root = square_root(d);
  return root * square_root(root);
}

static inline Vector power(Vector d, float beta) {
  for (int i = 0; i < kVectorWidth; ++i) d[i] = __builtin_powf(d[i], beta);
  return d;
}

template <typename T>
static void square_pixel(const T* x, int64_t channels, float* squares) {
  int64_t c = 0;
  for (; c + kVectorWidth <= channels; c += kVectorWidth) {
    const Vector v = load(x + c);
    store(squares + c, v * v);
  }
  for (; c < channels; ++c) {
    const float v = load_one(x + c);
    squares[c] = v * v;
  }
}

// Windows of the channels from `c` on: `squares` points at the first square of c's window.
template <bool ThreeQuarters>
static inline Vector normalised(const LocalResponseNormProblem& problem, Vector x, const float* squares) {
  Vector sum = load(squares);
  for (int64_t j = 1; j < problem.size; ++j) sum += load(squares + j);
  const Vector d = sum * problem.alpha_over_size + problem.k;
  return x / (ThreeQuarters ? three_quarters(d) : power(d, problem.beta));
}

template <typename T, bool ThreeQuarters>
static void normalise_pixel(const LocalResponseNormProblem& problem, const T* x, const float* squares, T* out) {
  const int64_t channels = problem.input.c;
  if (channels < kVectorWidth) {
    store_some(out, normalised<ThreeQuarters>(problem, load_some(x, channels), squares), channels);
    return;
  }
  int64_t c = 0;
  for (; c + kVectorWidth <= channels; c += kVectorWidth) {
    store(out + c, normalised<ThreeQuarters>(problem, load(x + c), squares + c));
  }
  if (c < channels) {  // the last vector overlaps the one before it
    c = channels - kVectorWidth;
    store(out + c, normalised<ThreeQuarters>(problem, load(x + c), squares + c));
  }
}

template <typename T, bool ThreeQuarters>
static void normalise(const LocalResponseNormProblem& problem, int64_t first, int64_t last, float* scratch) {
  const int64_t row = padded_row(problem), before = problem.size / 2;
  for (int64_t i = 0; i < kPixels * row; i += kVectorWidth) store(scratch + i, Vector{});
  for (int64_t group = first; group < last; group += kPixels) {
    const int64_t count = last - group < kPixels ? last - group : kPixels;
    const T* x = static_cast<const T*>(problem.input.data) + group * problem.input.pixel_stride;
    T* out = static_cast<T*>(problem.out.data) + group * problem.out.pixel_stride;
    for (int64_t i = 0; i < count; ++i) {
      square_pixel(x + i * problem.input.pixel_stride, problem.input.c, scratch + i * row + before);
    }
    for (int64_t i = 0; i < count; ++i) {
      normalise_pixel<T, ThreeQuarters>(problem, x + i * problem.input.pixel_stride, scratch + i * row,
                                        out + i * problem.out.pixel_stride);
    }
  }
}

}  // namespace

int64_t local_response_norm_scratch_bytes(const LocalResponseNormProblem& problem) {
  return kPixels * padded_row(problem) * 4;
}

void local_response_norm_task(const LocalResponseNormProblem& problem, int64_t index, void* scratch) {
  const int64_t pixels = problem.out.pixels();
  const int64_t first = index * problem.pixels_per_task;
  const int64_t last = pixels - first < problem.pixels_per_task ? pixels : first + problem.pixels_per_task;
  float* memory = static_cast<float*>(scratch);
  // Square roots of a negative infinity are NaN where its power is not: they need alpha >= 0.
  const bool roots = problem.beta == 0.75f && problem.alpha_over_size >= 0;
  if (problem.input.dtype == DType::f32) {
    roots ? normalise<float, true>(problem, first, last, memory)
          : normalise<float, false>(problem, first, last, memory);
  } else {
    roots ? normalise<uint16_t, true>(problem, first, last, memory)
          : normalise<uint16_t, false>(problem, first, last, memory);
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
