// What a stem kernel keeps in shared memory, on its way there: bands of input rows, filters, scale and bias. Layouts:
// stem_layout.h.
#pragma once

#include "../conv2d_problem.h"
#include "numeric.cuh"
#include "ptx.cuh"
#include "stem_layout.h"

namespace fastcnn::cuda {

constexpr int kStemLoadsInFlight = 8;  // pairs a thread fetches before it stores the first

// The band of `tile`, by 16-byte copies: element 8i of an image row is aligned, and whole vectors lie in the image.
template <typename T>
__device__ __forceinline__ void copy_band(const ConvProblem& problem, const StemPlan& plan, const StemTile& tile,
                                          uint32_t band, int thread, int threads) {
  const ConvShape& shape = problem.shape;
  const int vectors = plan.band_row / 8, count = plan.band_rows * vectors;
  const int first_h = tile.p * shape.stride_h - shape.pad_top;
  const int first_element = stem_start(plan, shape, tile) & ~7;
  const int row_elements = shape.width * shape.channels;
  const T* image =
      static_cast<const T*>(problem.input) + static_cast<int64_t>(tile.image) * shape.height * row_elements;
  for (int i = thread; i < count; i += threads) {
    int32_t vector;
    const int h = first_h + plan.by_band_row.divide(i, vector), element = first_element + 8 * vector;
    const bool real = static_cast<uint32_t>(h) < static_cast<uint32_t>(shape.height) &&
                      static_cast<uint32_t>(element) < static_cast<uint32_t>(row_elements);
    const T* from = real ? image + static_cast<int64_t>(h) * row_elements + element : image;
    copy_async_16(band + 16 * i, from, real);
  }
}

// The same by single elements, for any width and alignment, and for a band with a zero behind each pixel's channels.
template <typename T>
__device__ __forceinline__ void store_band(const ConvProblem& problem, const StemPlan& plan, const StemTile& tile,
                                           unsigned char* band, int thread, int threads) {
  const ConvShape& shape = problem.shape;
  const int words = plan.band_row / 2, count = plan.band_rows * words;
  const int first_h = tile.p * shape.stride_h - shape.pad_top;
  const int first_element = stem_start(plan, shape, tile) & ~7;
  const int row_elements = shape.width * shape.channels;
  const bool gaps = plan.pixel != shape.channels;
  const int log2_pixel = plan.pixel == 2 ? 1 : 2;  // with gaps, a pixel is 2 or 4 elements
  const T* image =
      static_cast<const T*>(problem.input) + static_cast<int64_t>(tile.image) * shape.height * row_elements;
  for (int first = thread; first < count; first += kStemLoadsInFlight * threads) {
    T values[kStemLoadsInFlight][2];
#pragma unroll
    for (int j = 0; j < kStemLoadsInFlight; ++j) {
      const int i = first + j * threads;
      int32_t word;
      const int h = first_h + plan.by_band_row.divide(i, word);
      const bool row_real = i < count && static_cast<uint32_t>(h) < static_cast<uint32_t>(shape.height);
      const T* row = image + static_cast<int64_t>(h) * row_elements;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int element = first_element + 2 * word + half;
        bool real = row_real;
        if (gaps) {
          const int channel = element & (plan.pixel - 1);
          real = real && channel < shape.channels;
          element = (element >> log2_pixel) * shape.channels + channel;
        }
        real = real && static_cast<uint32_t>(element) < static_cast<uint32_t>(row_elements);
        values[j][half] = real ? row[element] : from_float<T>(0.0f);
      }
    }
#pragma unroll
    for (int j = 0; j < kStemLoadsInFlight; ++j) {
      const int i = first + j * threads;
      if (i >= count) continue;
      uint32_t bits;
      memcpy(&bits, values[j], 4);
      *reinterpret_cast<uint32_t*>(band + 4 * i) = bits;
    }
  }
}

// Starts filling one of the two bands; whatever is left in flight is in the copy group that this commits.
template <typename T>
__device__ __forceinline__ void load_band(const ConvProblem& problem, const StemPlan& plan, const StemTile& tile,
                                          unsigned char* band, int thread, int threads) {
  if (plan.vectors) {
    copy_band<T>(problem, plan, tile, shared_address(band), thread, threads);
  } else {
    store_band<T>(problem, plan, tile, band, thread, threads);
  }
  copy_async_commit();
}

// One element of filter row r, in the band's coordinates; zero where a pair reaches past the window.
template <typename T>
__device__ __forceinline__ T weight_element(const ConvProblem& problem, const StemPlan& plan, int filter, int r,
                                            int element) {
  const int channels = problem.shape.channels;
  const int log2_pixel = plan.pixel == 2 ? 1 : 2;
  bool real =
      filter < problem.shape.filters && r < plan.filter_h && element >= 0 && element < plan.filter_w * plan.pixel;
  if (plan.pixel != channels) {
    const int channel = element & (plan.pixel - 1);
    real = real && channel < channels;
    element = (element >> log2_pixel) * channels + channel;
  }
  const T* weight = static_cast<const T*>(problem.weight) + filter * problem.weight_row_stride;
  return real ? weight[r * plan.filter_w * channels + element] : from_float<T>(0.0f);
}

// Packs the block's filters: `place` says at which 32-bit word of shared memory a filter's pair belongs.
template <typename T, int kColumns, typename Place>
__device__ __forceinline__ void pack_weights(const ConvProblem& problem, const StemPlan& plan, int first_filter,
                                             uint32_t* weights, int thread, int threads, const Place& place) {
  const int depth = plan.steps * 8, count = kColumns * depth;
  for (int first = thread; first < count; first += kStemLoadsInFlight * threads) {
    T values[kStemLoadsInFlight][2];
#pragma unroll
    for (int j = 0; j < kStemLoadsInFlight; ++j) {
      int32_t pair, in_row;
      const int filter = first_filter + plan.by_depth.divide(first + j * threads, pair);
      const int r = plan.by_pairs.divide(pair, in_row);
      const int element = 2 * in_row - plan.odd;
      values[j][0] = weight_element<T>(problem, plan, filter, r, element);
      values[j][1] = weight_element<T>(problem, plan, filter, r, element + 1);
    }
#pragma unroll
    for (int j = 0; j < kStemLoadsInFlight; ++j) {
      int32_t pair;
      const int column = plan.by_depth.divide(first + j * threads, pair);
      uint32_t bits;
      memcpy(&bits, values[j], 4);
      if (column < kColumns) weights[place(column, pair)] = bits;
    }
  }
}

// The taps of every step, and two steps more for readers ahead, then scale and bias of the block's filters.
template <int kColumns>
__device__ __forceinline__ void fill_tables(const ConvProblem& problem, const StemPlan& plan, int first_filter,
                                            StemTap* taps, float* scales, int thread, int threads) {
  float* biases = scales + kColumns;
  for (int i = thread; i < (plan.steps + 2) * 4; i += threads) taps[i] = stem_tap(plan, i / 4, i % 4);
  for (int i = thread; i < kColumns; i += threads) {
    const bool real = first_filter + i < problem.shape.filters;
    scales[i] = real && problem.scale != nullptr ? problem.scale[first_filter + i] : 1.0f;
    biases[i] = real && problem.bias != nullptr ? problem.bias[first_filter + i] : 0.0f;
  }
}

__device__ __forceinline__ uint32_t load_stem_pair(const unsigned char* bands, uint32_t offset, uint32_t mask) {
  return *reinterpret_cast<const uint32_t*>(bands + offset) & mask;
}

}  // namespace fastcnn::cuda
