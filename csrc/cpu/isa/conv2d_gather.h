// How direct convolution brings its input into reach of the micro-kernel: as fp32, with border zeros and the prologue.
#pragma once

#include "table.h"
#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int64_t kMaxChunk = kConv2dMaxChunk;
constexpr int64_t kPanelStride = kMaxChunk + 16;  // not a multiple of 1 KiB: rows spread over the cache's sets

struct Pixel {
  int64_t input_row;  // first pixel of image n in the input, in pixels
  int64_t ih, iw;     // input position of filter tap (0, 0); may lie outside
};

// Runs shorter than a vector go value by value; the end of a longer one is covered by a vector that overlaps its
// neighbour.
static inline void zero_fill(float* to, int64_t count) {
  if (count < kVectorWidth) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0.0f;
    return;
  }
  for (int64_t i = 0; i + kVectorWidth < count; i += kVectorWidth) store(to + i, Vector{});
  store(to + count - kVectorWidth, Vector{});
}

template <typename T>
static inline void copy_run(float* to, const T* from, int64_t count) {
  if (count < kVectorWidth) {
    for (int64_t i = 0; i < count; ++i) to[i] = load_one(from + i);
    return;
  }
  for (int64_t i = 0; i + kVectorWidth < count; i += kVectorWidth) store(to + i, load(from + i));
  store(to + count - kVectorWidth, load(from + count - kVectorWidth));
}

// The prologue of channels [c, ...), one vector of them at a time.
struct ChannelPrologue {
  const float* scale;
  const float* shift;
  bool has_relu;

  Vector operator()(Vector x, int64_t i, int64_t lanes) const {
    if (scale != nullptr) x *= lanes < kVectorWidth ? load_some(scale + i, lanes) : load(scale + i);
    if (shift != nullptr) x += lanes < kVectorWidth ? load_some(shift + i, lanes) : load(shift + i);
    return has_relu ? relu(x) : x;
  }
};

// copy_run with the prologue applied on the way.
template <typename T>
static inline void copy_run(float* to, const T* from, int64_t count, const ChannelPrologue& prologue) {
  if (count < kVectorWidth) {
    store_some(to, prologue(load_some(from, count), 0, count), count);
    return;
  }
  for (int64_t i = 0; i + kVectorWidth < count; i += kVectorWidth) {
    store(to + i, prologue(load(from + i), i, kVectorWidth));
  }
  const int64_t last = count - kVectorWidth;
  store(to + last, prologue(load(from + last), last, kVectorWidth));
}

// Reduction values [begin, end) of all pixels, tap by tap: each tap is a run of adjacent channels.
template <typename T>
static void gather_taps(const Conv2dProblem& problem, const Pixel* pixels, int64_t rows, int64_t channel0,
                        int64_t begin, int64_t end, bool has_prologue, float* panel) {
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& x = problem.input;
  const T* data = static_cast<const T*>(x.data);
  const int64_t channels = problem.group_in;
  int64_t tap = begin / channels, c = begin % channels;
  while (begin < end) {
    const int64_t count = channels - c < end - begin ? channels - c : end - begin;
    const ChannelPrologue prologue = {problem.input_scale ? problem.input_scale + channel0 + c : nullptr,
                                      problem.input_shift ? problem.input_shift + channel0 + c : nullptr,
                                      problem.input_relu};
    const int64_t dh = tap / g.filter_w * g.dilation_h, dw = tap % g.filter_w * g.dilation_w;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t h = pixels[i].ih + dh, w = pixels[i].iw + dw;
      float* to = panel + i * kPanelStride;
      if (h >= 0 && h < x.h && w >= 0 && w < x.w) {
        const T* from = data + (pixels[i].input_row + h * x.w + w) * x.pixel_stride + channel0 + c;
        if (has_prologue) {
          copy_run(to, from, count, prologue);
        } else {
          copy_run(to, from, count);
        }
      } else {
        zero_fill(to, count);
      }
    }
    panel += count;
    begin += count;
    c = 0;
    ++tap;
  }
}

// The same where a filter row's taps are adjacent in memory (no dilation, pixels without gaps): one run per filter row.
// This is the few-channel stem's path.
template <typename T>
static void gather_rows(const Conv2dProblem& problem, const Pixel& pixel, int64_t begin, int64_t end, float* to) {
  const Conv2dGeometry& g = problem.geometry;
  const TensorView& x = problem.input;
  const T* data = static_cast<const T*>(x.data);
  const int64_t channels = x.c;
  const int64_t row_length = g.filter_w * channels;
  // Taps [first, last) of a row lie inside the image.
  int64_t first = -pixel.iw, last = x.w - pixel.iw;
  first = first < 0 ? 0 : (first > g.filter_w ? g.filter_w : first);
  last = last < first ? first : (last > g.filter_w ? g.filter_w : last);
  int64_t r = begin / row_length, j = begin % row_length;
  while (begin < end) {
    const int64_t count = row_length - j < end - begin ? row_length - j : end - begin;
    const int64_t h = pixel.ih + r * g.dilation_h;
    int64_t lo = first * channels, hi = last * channels;
    if (h < 0 || h >= x.h) lo = hi = 0;
    lo = lo < j ? j : (lo > j + count ? j + count : lo);
    hi = hi < lo ? lo : (hi > j + count ? j + count : hi);
    zero_fill(to, lo - j);
    if (hi > lo) copy_run(to + (lo - j), data + (pixel.input_row + h * x.w + pixel.iw) * channels + lo, hi - lo);
    zero_fill(to + (hi - j), j + count - hi);
    to += count;
    begin += count;
    j = 0;
    ++r;
  }
}

template <typename T>
static void gather_panel(const Conv2dProblem& problem, const Pixel* pixels, int64_t rows, int64_t channel0,
                         int64_t begin, int64_t end, float* panel) {
  const Conv2dGeometry& g = problem.geometry;
  const bool has_prologue = problem.has_prologue();
  const bool adjacent_taps = problem.geometry.groups == 1 && problem.input.pixel_stride == problem.input.c &&
                             g.dilation_w == 1 && g.filter_w > 1 && !has_prologue;
  if (!adjacent_taps) {
    gather_taps<T>(problem, pixels, rows, channel0, begin, end, has_prologue, panel);
    return;
  }
  for (int64_t i = 0; i < rows; ++i) gather_rows<T>(problem, pixels[i], begin, end, panel + i * kPanelStride);
}

// Channels [channel0, channel0 + C/groups) of input rows [h, h + rows) of image n, each with its left and right
// padding, `strip_pitch` values a row.
template <typename T>
static void fill_strip(const Conv2dProblem& problem, int64_t n, int64_t h, int64_t rows, int64_t channel0,
                       float* strip) {
  const TensorView& x = problem.input;
  const int64_t channels = problem.group_in, width = problem.strip_pixels;
  const int64_t pad = problem.geometry.pad_left, left = pad < width ? pad : width;
  const int64_t inside = x.w < width - left ? x.w : width - left;  // input pixels that are read
  const bool has_prologue = problem.has_prologue();
  const bool next_group = channel0 + channels < x.c;  // which the next task reads
  const ChannelPrologue prologue = {problem.input_scale ? problem.input_scale + channel0 : nullptr,
                                    problem.input_shift ? problem.input_shift + channel0 : nullptr, problem.input_relu};
  for (int64_t i = 0; i < rows; ++i, ++h, strip += problem.strip_pitch) {
    if (h < 0 || h >= x.h) {
      zero_fill(strip, width * channels);
      continue;
    }
    const T* from = static_cast<const T*>(x.data) + (n * x.h + h) * x.w * x.pixel_stride + channel0;
    float* to = strip + left * channels;
    zero_fill(strip, left * channels);
    if (!has_prologue && x.pixel_stride == channels) {
      copy_run(to, from, inside * channels);
    } else {
      for (int64_t w = 0; w < inside; ++w, from += x.pixel_stride) {
        if (next_group) __builtin_prefetch(from + channels, 0, 2);
        if (has_prologue) {
          copy_run(to + w * channels, from, channels, prologue);
        } else {
          copy_run(to + w * channels, from, channels);
        }
      }
    }
    zero_fill(to + inside * channels, (width - left - inside) * channels);
  }
}

// Input rows of a task as fp32, one after the other: a row's pixels without gaps, with their padding.
struct StripRows {
  const float* first;
  int64_t pitch;  // floats from one row to the next
};

// What fill_strip() would copy, where it lies already: rows without padding, few enough to stay in L1.
static bool reads_rows_in_place(const Conv2dProblem& problem, int64_t h, int64_t rows) {
  constexpr int64_t kNearBytes = 32 << 10;
  const TensorView& x = problem.input;
  return x.dtype == DType::f32 && !problem.has_prologue() && x.pixel_stride == problem.group_in &&
         problem.geometry.pad_left == 0 && problem.strip_pixels <= x.w && h >= 0 && h + rows <= x.h &&
         rows * x.w * x.pixel_stride * 4 <= kNearBytes;
}

// As fill_strip(): in `strip`, or in place. beyond: whether what lies behind a row is read, too.
[[maybe_unused]] static StripRows bring_rows(const Conv2dProblem& problem, int64_t n, int64_t h, int64_t rows,
                                             int64_t channel0, bool beyond, float* strip) {
  const TensorView& x = problem.input;
  if (!beyond && reads_rows_in_place(problem, h, rows)) {
    const int64_t pitch = x.w * x.pixel_stride;
    return {static_cast<const float*>(x.data) + (n * x.h + h) * pitch, pitch};
  }
  if (x.dtype == DType::f32) {
    fill_strip<float>(problem, n, h, rows, channel0, strip);
  } else {
    fill_strip<uint16_t>(problem, n, h, rows, channel0, strip);
  }
  return {strip, problem.strip_pitch};
}

}  // namespace
}  // namespace fastcnn::cpu::FASTCNN_ISA
