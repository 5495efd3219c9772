// The filters' side of Winograd's algorithm in one direction, G; isa/conv2d_winograd_points.h has the other two.
#pragma once

#include <vector>

namespace fastcnn::cpu {

// G, row by row: the filter polynomial's value at each finite point over the product of its distances to the others;
// at infinity its leading coefficient.
std::vector<double> winograd_filter_transform(int side, int taps);

}  // namespace fastcnn::cpu
