// Convolution as a matrix product without building the matrix: which input element is row m, column k of im2col.
//
//   row    m = (n * P + p) * Q + q          an output pixel
//   column k = (r * S + s) * C/g + c        a filter tap and a channel
//   value    input[n, p*stride - pad + r*dilation, q*stride - pad + s*dilation, c], or 0 outside the image
//
// Row and column contribute independently to the address and to the image coordinates, so a thread computes its rows
// once (PixelOrigin), its column once per tile of k (FilterTap), and adds the two.
//
// Bounds (checked on the host): rows and columns stay below 2^30; H, W, padding and the dilated filter's extent below
// 2^28, so coordinates fit 32 bits. A row past
// the end carries h = 0x80000000, a column past the end h = 0x40000000: their sum with any real coordinate, or with
// each other, is still larger than any H when read as unsigned, as are the negative coordinates of padding. One
// unsigned comparison per axis therefore answers "is this element real?". Offsets are 64-bit.
#pragma once

#include <cstdint>

#include "fast_divide.h"
#include "portable.h"

namespace fastcnn::cuda {

constexpr uint32_t kRowPastEnd = 0x80000000u;
constexpr uint32_t kColumnPastEnd = 0x40000000u;
constexpr int64_t kRowLimit = int64_t{1} << 30;
constexpr int64_t kCoordinateLimit = int64_t{1} << 28;

struct ConvShape {
  int32_t rows = 0;       // N * P * Q
  int32_t reduction = 0;  // R * S * C/g
  int32_t channels = 0;   // C/g
  int32_t filters = 0;    // K/g
  int32_t height = 0, width = 0;
  int32_t stride_h = 1, stride_w = 1;
  int32_t pad_top = 0, pad_left = 0;
  int32_t dilation_h = 1, dilation_w = 1;
  int64_t pixel_stride = 0;
  FastDivisor by_image;     // P * Q
  FastDivisor by_row;       // Q
  FastDivisor by_channels;  // C/g
  FastDivisor by_filter_w;  // S
};

struct PixelOrigin {
  int64_t offset;  // elements from the input's start to the window's top left pixel (negative inside padding)
  uint32_t h, w;
};

struct FilterTap {
  int64_t offset;
  uint32_t h, w;
  int32_t channel;  // within the group
};

FASTCNN_HD PixelOrigin pixel_origin(const ConvShape& shape, int32_t row) {
  if (row >= shape.rows) return {0, kRowPastEnd, 0};
  int32_t pixel, q;
  const int32_t n = shape.by_image.divide(row, pixel);
  const int32_t p = shape.by_row.divide(pixel, q);
  const int32_t h = p * shape.stride_h - shape.pad_top;
  const int32_t w = q * shape.stride_w - shape.pad_left;
  const int64_t index = (static_cast<int64_t>(n) * shape.height + h) * shape.width + w;
  return {index * shape.pixel_stride, static_cast<uint32_t>(h), static_cast<uint32_t>(w)};
}

FASTCNN_HD FilterTap filter_tap(const ConvShape& shape, int32_t column) {
  if (column >= shape.reduction) return {0, kColumnPastEnd, 0, 0};
  int32_t channel, s;
  const int32_t tap = shape.by_channels.divide(column, channel);
  const int32_t r = shape.by_filter_w.divide(tap, s);
  const int32_t h = r * shape.dilation_h;
  const int32_t w = s * shape.dilation_w;
  const int64_t index = static_cast<int64_t>(h) * shape.width + w;
  return {index * shape.pixel_stride + channel, static_cast<uint32_t>(h), static_cast<uint32_t>(w), channel};
}

FASTCNN_HD bool inside_image(const ConvShape& shape, const PixelOrigin& origin, const FilterTap& tap) {
  return origin.h + tap.h < static_cast<uint32_t>(shape.height) &&
         origin.w + tap.w < static_cast<uint32_t>(shape.width);
}

}  // namespace fastcnn::cuda
