#include "conv2d_winograd_filter.h"

#include <cstddef>

namespace fastcnn::cpu {
namespace {

// The finite points of tiles with `side` points to a side; the last point is infinity.
std::vector<double> finite_points(int side) {
  switch (side) {
    case 3:
      return {1, -1};
    case 4:
      return {0, 1, -1};
    case 5:
      return {0.375, -0.375, 1.25, -1.25};
    case 6:
      return {0, 0.625, -0.625, 1.5, -1.5};
    case 7:
      return {0.375, -0.375, 0.875, -0.875, 1.75, -1.75};
    default:
      return {0, 0.5, -0.5, 1, -1, 2, -2};
  }
}

}  // namespace

std::vector<double> winograd_filter_transform(int side, int taps) {
  const std::vector<double> points = finite_points(side);
  std::vector<double> rows;
  for (const double p : points) {
    double value = 1;
    for (const double q : points) value /= p == q ? 1 : p - q;
    for (int tap = 0; tap < taps; ++tap, value *= p) rows.push_back(value);
  }
  rows.resize(static_cast<size_t>(side * taps));
  rows.back() = 1;
  return rows;
}

}  // namespace fastcnn::cpu
