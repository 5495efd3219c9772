// Encodes tensor maps with the driver's functions, found at run time: the module must load where there is no driver.
#include "tensor_map.h"

namespace fastcnn::cuda {

namespace {

// The copy engine takes a window's last pixel relative to the image's own.
int64_t upper_corner(int64_t first, int64_t count, int64_t stride, int64_t size) {
  return first + (count - 1) * stride + 1 - size;
}

}  // namespace

bool pixel_map_fits(const TensorView& image, const PixelMap& pixels) {
  const auto corner = [](int64_t value) { return value >= -128 && value <= 127; };
  return pixels.stride_w <= 8 && pixels.stride_h <= 8 && corner(pixels.first_w) && corner(pixels.first_h) &&
         corner(upper_corner(pixels.first_w, pixels.columns, pixels.stride_w, image.w)) &&
         corner(upper_corner(pixels.first_h, pixels.rows, pixels.stride_h, image.h));
}

}  // namespace fastcnn::cuda

#if !defined(FASTCNN_CUDA_EMULATOR)  // which has maps of its own

#include <cuda.h>

#include <string>

#include "host.h"

namespace fastcnn::cuda {

namespace {

void* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), name);
#else
  check(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found), name);
#endif
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error(std::string("fastcnn CUDA: the driver has no ") + name);
  }
  return function;
}

void check_encoded(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  throw std::runtime_error(std::string("fastcnn CUDA: ") + what + " refused: error " + std::to_string(result));
}

CUtensorMapDataType type_of(DType dtype) {
  return dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

cuuint64_t bytes(int64_t values) {
  return static_cast<cuuint64_t>(values) * 2;
}

// Lines that L2 fetches at once: whole ones only where pixels begin on them.
CUtensorMapL2promotion promotion(int64_t pixel_stride) {
  return bytes(pixel_stride) % 128 == 0 ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_64B;
}

CUtensorMapSwizzle swizzle_of(int row) {
  return row == kTensorMapRow ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
}

template <int kRank>
TensorMap tiled_map(void* data, DType dtype, const cuuint64_t (&sizes)[kRank], const cuuint64_t (&strides)[kRank - 1],
                    const cuuint32_t (&box)[kRank], CUtensorMapL2promotion fetch = CU_TENSOR_MAP_L2_PROMOTION_L2_128B) {
  static const auto encode =
      reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(driver_function("cuTensorMapEncodeTiled"));
  cuuint32_t steps[kRank];
  for (cuuint32_t& step : steps) step = 1;
  TensorMap map;
  check_encoded(encode(reinterpret_cast<CUtensorMap*>(&map), type_of(dtype), kRank, data, sizes, strides, box, steps,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(static_cast<int>(box[0])), fetch,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                "cuTensorMapEncodeTiled");
  return map;
}

}  // namespace

TensorMap pixel_map(const TensorView& image, const PixelMap& pixels) {
  static const auto encode =
      reinterpret_cast<decltype(&cuTensorMapEncodeIm2col)>(driver_function("cuTensorMapEncodeIm2col"));
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(image.c), static_cast<cuuint64_t>(image.w),
                               static_cast<cuuint64_t>(image.h), static_cast<cuuint64_t>(image.n)};
  const cuuint64_t strides[3] = {bytes(image.pixel_stride), bytes(image.pixel_stride * image.w),
                                 bytes(image.pixel_stride * image.w * image.h)};
  const int lower[2] = {static_cast<int>(pixels.first_w), static_cast<int>(pixels.first_h)};
  const int upper[2] = {static_cast<int>(upper_corner(pixels.first_w, pixels.columns, pixels.stride_w, image.w)),
                        static_cast<int>(upper_corner(pixels.first_h, pixels.rows, pixels.stride_h, image.h))};
  const cuuint32_t steps[4] = {1, static_cast<cuuint32_t>(pixels.stride_w), static_cast<cuuint32_t>(pixels.stride_h),
                               1};
  TensorMap map;
  check_encoded(encode(reinterpret_cast<CUtensorMap*>(&map), type_of(image.dtype), 4, image.data, sizes, strides, lower,
                       upper, static_cast<cuuint32_t>(pixels.row), static_cast<cuuint32_t>(pixels.tile_pixels), steps,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(pixels.row), promotion(image.pixel_stride),
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                "cuTensorMapEncodeIm2col");
  return map;
}

TensorMap filter_map(const void* weight, DType dtype, int64_t filters, int64_t taps, int64_t channels,
                     int64_t row_stride, int tile_filters, int row) {
  return tiled_map<3>(
      const_cast<void*>(weight), dtype,
      {static_cast<cuuint64_t>(channels), static_cast<cuuint64_t>(taps), static_cast<cuuint64_t>(filters)},
      {bytes(channels), bytes(row_stride)}, {static_cast<cuuint32_t>(row), 1, static_cast<cuuint32_t>(tile_filters)});
}

TensorMap image_map(const TensorView& view, int box_w, int box_h, int box_n) {
  const int64_t stride = view.pixel_stride;
  return tiled_map<4>(
      view.data, view.dtype,
      {static_cast<cuuint64_t>(view.c), static_cast<cuuint64_t>(view.w), static_cast<cuuint64_t>(view.h),
       static_cast<cuuint64_t>(view.n)},
      {bytes(stride), bytes(stride * view.w), bytes(stride * view.w * view.h)},
      {kTensorMapRow, static_cast<cuuint32_t>(box_w), static_cast<cuuint32_t>(box_h), static_cast<cuuint32_t>(box_n)});
}

TensorMap matrix_map(const TensorView& view, int tile_pixels, bool in_pairs) {
  const bool lines = bytes(view.pixel_stride) % 256 == 0 && reinterpret_cast<uintptr_t>(view.data) % 256 == 0;
  return tiled_map<2>(view.data, view.dtype, {static_cast<cuuint64_t>(view.c), static_cast<cuuint64_t>(view.pixels())},
                      {bytes(view.pixel_stride)}, {kTensorMapRow, static_cast<cuuint32_t>(tile_pixels)},
                      in_pairs && lines ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}

}  // namespace fastcnn::cuda

#endif
