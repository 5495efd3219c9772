// Mean and variance of each channel over a batch: what batch norm needs in training.
//
//   mean[c] = sum_p x[p, c] / M,   m2[c] = sum_p (x[p, c] - mean[c])^2
//
// Shapes: p runs over the M = N*H*W pixels of a channels-last tensor.
//
// Work: a task owns a run of pixels and a run of channels, and goes over its pixels in blocks that stay in L1 or L2. Of
// each block it takes the mean first and the squares about that mean second, with the correction
// sum(d)^2 / n for the mean's own rounding; so large means cost no digits. Blocks, and later tasks, are merged pairwise
// in double precision (Chan, Golub and LeVeque, 1979). Blocks and tasks depend on the shape alone: the result is the
// same for every number of threads.
//
// In registers: the sums of kVectors vectors of channels, over two alternating pixels. Floor: bytes of x, once from
// memory.

#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kVectors = 4;

// Vectors of channels [c, c + Vectors * kVectorWidth) of one pixel; lanes beyond `valid` channels are whatever.
template <int Vectors, typename T>
static inline void load_channels(const T* x, int64_t valid, bool whole, Vector* values) {
  if (whole) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) values[j] = load(x + j * kVectorWidth);
    return;
  }
  for (int j = 0; j < Vectors; ++j) {
    const int64_t left = valid - j * kVectorWidth;
    values[j] =
        left >= kVectorWidth ? load(x + j * kVectorWidth) : load_some(x + j * kVectorWidth, left < 0 ? 0 : left);
  }
}

// One block of pixels, `valid` channels: their mean and sum of squares about it. `whole_pixels` of them may be read in
// whole vectors without leaving the tensor; the order of additions is the same for all.
template <int Vectors, typename T>
static void block_statistics(const T* x, int64_t stride, int64_t pixels, int64_t whole_pixels, int64_t valid,
                             float* mean, float* m2) {
  Vector sum[2][Vectors] = {};
  Vector value[Vectors];
  int64_t p = 0;
  for (; p + 2 <= whole_pixels; p += 2) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      sum[0][j] += load(x + p * stride + j * kVectorWidth);
      sum[1][j] += load(x + (p + 1) * stride + j * kVectorWidth);
    }
  }
  for (; p < pixels; p += 2) {
    for (int i = 0; i < 2 && p + i < pixels; ++i) {
      load_channels<Vectors>(x + (p + i) * stride, valid, p + i < whole_pixels, value);
      for (int j = 0; j < Vectors; ++j) sum[i][j] += value[j];
    }
  }
  const float inverse = 1.0f / static_cast<float>(pixels);
  Vector centre[Vectors], first[2][Vectors] = {}, second[2][Vectors] = {};
#pragma GCC unroll 4
  for (int j = 0; j < Vectors; ++j) centre[j] = (sum[0][j] + sum[1][j]) * inverse;
  p = 0;
  for (; p + 2 <= whole_pixels; p += 2) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      const Vector a = load(x + p * stride + j * kVectorWidth) - centre[j];
      const Vector b = load(x + (p + 1) * stride + j * kVectorWidth) - centre[j];
      first[0][j] += a;
      first[1][j] += b;
      second[0][j] += a * a;
      second[1][j] += b * b;
    }
  }
  for (; p < pixels; p += 2) {
    for (int i = 0; i < 2 && p + i < pixels; ++i) {
      load_channels<Vectors>(x + (p + i) * stride, valid, p + i < whole_pixels, value);
      for (int j = 0; j < Vectors; ++j) {
        const Vector d = value[j] - centre[j];
        first[i][j] += d;
        second[i][j] += d * d;
      }
    }
  }
  for (int j = 0; j < Vectors; ++j) {
    const Vector offset = (first[0][j] + first[1][j]) * inverse;
    store(mean + j * kVectorWidth, centre[j]);
    // What rounding left out of the mean; an infinite mean stays one.
    store(mean + (Vectors + j) * kVectorWidth, offset == offset ? offset : Vector{});
    store(m2 + j * kVectorWidth, second[0][j] + second[1][j] - (first[0][j] + first[1][j]) * offset);
  }
}

template <int Vectors, typename T>
static void merge_block(const T* x, int64_t stride, int64_t pixels, int64_t whole_pixels, int64_t valid, int64_t seen,
                        double* sum, double* m2) {
  constexpr int kWidth = Vectors * kVectorWidth;
  float block_mean[2 * kWidth], block_m2[kWidth];
  block_statistics<Vectors>(x, stride, pixels, whole_pixels, valid, block_mean, block_m2);
  const double earlier = static_cast<double>(seen), here = static_cast<double>(pixels);
  for (int64_t i = 0; i < (valid < kWidth ? valid : kWidth); ++i) {
    const double mean = static_cast<double>(block_mean[i]) + static_cast<double>(block_mean[kWidth + i]);
    const double delta = seen > 0 ? mean - sum[i] / earlier : 0.0;
    sum[i] = (seen > 0 ? sum[i] : 0.0) + mean * here;
    m2[i] = (seen > 0 ? m2[i] : 0.0) + static_cast<double>(block_m2[i]) +
            delta * delta * (here * earlier / (here + earlier));
  }
}

template <typename T>
static void run_task(const BatchStatisticsProblem& problem, int64_t index) {
  const TensorView& view = problem.input;
  const int64_t channel_tasks = (view.c + problem.channels_per_task - 1) / problem.channels_per_task;
  const int64_t row_task = index / channel_tasks;
  const int64_t c0 = index % channel_tasks * problem.channels_per_task;
  const int64_t c1 = c0 + problem.channels_per_task < view.c ? c0 + problem.channels_per_task : view.c;
  const int64_t total = view.pixels();
  const int64_t p0 = row_task * problem.pixels_per_task;
  const int64_t p1 = p0 + problem.pixels_per_task < total ? p0 + problem.pixels_per_task : total;
  const int64_t stride = view.pixel_stride;
  const int64_t end_of_tensor = (total - 1) * stride + view.c;
  double* sum = problem.sum + row_task * view.c;
  double* m2 = problem.m2 + row_task * view.c;
  for (int64_t p = p0; p < p1; p += problem.pixels_per_block) {
    const int64_t pixels = p1 - p < problem.pixels_per_block ? p1 - p : problem.pixels_per_block;
    for (int64_t c = c0; c < c1;) {
      const int vectors = c1 - c > kVectorWidth ? kVectors : 1;
      const int64_t width = vectors * kVectorWidth;
      // Pixels whose whole vectors end inside the tensor: channels that belong to others are read there, and dropped.
      const int64_t start = p * stride + c;
      int64_t whole = start + width > end_of_tensor ? 0 : (end_of_tensor - start - width) / stride + 1;
      whole = whole < pixels ? whole : pixels;
      const T* x = static_cast<const T*>(view.data) + start;
      const int64_t valid = c1 - c < width ? c1 - c : width;
      if (vectors == 1) {
        merge_block<1>(x, stride, pixels, whole, valid, p - p0, sum + c, m2 + c);
      } else {
        merge_block<kVectors>(x, stride, pixels, whole, valid, p - p0, sum + c, m2 + c);
      }
      c += width;
    }
  }
}

}  // namespace

void batch_statistics_task(const BatchStatisticsProblem& problem, int64_t index) {
  if (problem.input.dtype == DType::f32) {
    run_task<float>(problem, index);
  } else {
    run_task<uint16_t>(problem, index);
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
