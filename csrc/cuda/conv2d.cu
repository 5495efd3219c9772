// Which convolution kernel serves a case. The first line that fits wins.
//
//   kernel      types        serves                                                            where
//   depthwise   all          C/g = K/g = 1, channels aligned                                   CUDA cores
//   grouped     all          groups with C/g < 16 or K/g < 8                                   CUDA cores
//   simt        fp32         exact arithmetic (TF32 not allowed)                               CUDA cores
//   stem        bf16, fp16   groups = 1, C <= 4 and nothing between pixels, no dilation, no     tensor cores, sm_80+
//                            prologue, its filters fit in shared memory
//   stem wgmma  bf16, fp16   the same with K > 32                                              tensor cores, sm_90a
//   wgmma       bf16, fp16   groups = 1, aligned, enough tiles for the device                  tensor cores, sm_90a
//   mma         all          the rest: aligned by cp.async; with a prologue by 16-byte         tensor cores, sm_80+
//                            vectors through registers; anything else element by element
//
// "Aligned": the input, its pixel stride, C/g and the filters are multiples of 16 bytes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "conv2d_problem.h"
#include "host.h"
#include "kernels.h"

namespace fastcnn::cuda {
namespace {

enum class Kernel { depthwise, grouped, simt, stem, stem_wgmma, wgmma, mma };

struct Choice {
  Kernel kernel;
  LoadPath path;
  int tile_rows = 0, tile_columns = 0;
};

int64_t tiles(const ConvProblem& problem, int rows, int columns) {
  return ceil_divide(problem.shape.rows, rows) * ceil_divide(problem.shape.filters, columns) * problem.groups;
}

int64_t padded(int64_t filters, int64_t columns) {
  return ceil_divide(filters, columns) * columns;
}

// A wide tile reuses its operands more, as long as it adds no idle columns and the device stays busy.
int mma_columns(const ConvProblem& problem, int64_t multiprocessors) {
  const int64_t filters = problem.shape.filters;
  if (filters <= 32) return 32;
  return padded(filters, 128) <= padded(filters, 64) && tiles(problem, 128, 128) >= multiprocessors ? 128 : 64;
}

Choice choose(const ConvProblem& problem, DType dtype, bool allow_tf32, const DeviceFacts& device) {
  const ConvShape& shape = problem.shape;
  const int64_t size = size_in_bytes(dtype);
  const bool aligned = aligned_16(problem.input) && aligned_16(problem.weight) && shape.pixel_stride * size % 16 == 0 &&
                       shape.channels * size % 16 == 0 && problem.weight_row_stride * size % 16 == 0;
  const LoadPath path = !aligned                 ? LoadPath::staged_elements
                        : problem.has_prologue() ? LoadPath::staged_vectors
                                                 : LoadPath::async_vectors;

  if (problem.groups > 1) {
    const bool vectors = problem.vector_output && aligned_16(problem.input) && shape.pixel_stride * size % 16 == 0;
    const bool fits = dtype == DType::f32    ? depthwise_fits<float>(problem)
                      : dtype == DType::bf16 ? depthwise_fits<__nv_bfloat16>(problem)
                                             : depthwise_fits<__half>(problem);
    if (shape.channels == 1 && shape.filters == 1 && vectors && fits) return {Kernel::depthwise, path};
    if (shape.channels < 16 || shape.filters < 8 || problem.groups > 65535) return {Kernel::grouped, path};
  }
  if (dtype == DType::f32 && !allow_tf32) return {Kernel::simt, path};

  if (dtype != DType::f32 && stem_fits(problem, device, true)) return {Kernel::stem_wgmma, path};
  if (dtype != DType::f32 && stem_fits(problem, device, false)) return {Kernel::stem, path};

  const int64_t multiprocessors = device.multiprocessors;
  if (device.wgmma && dtype != DType::f32 && problem.groups == 1 && path != LoadPath::staged_elements &&
      shape.filters > 32 && 2 * tiles(problem, 128, 64) >= multiprocessors) {
    int columns = mma_columns(problem, multiprocessors);
    if (path == LoadPath::async_vectors && shape.filters % 256 == 0 && tiles(problem, 128, 256) >= 2 * multiprocessors)
      columns = 256;
    return {Kernel::wgmma, path, 128, columns};
  }
  if (path == LoadPath::staged_elements) return {Kernel::mma, path, 64, 64};
  int columns = mma_columns(problem, multiprocessors);
  if (path == LoadPath::staged_vectors) columns = std::min(columns, 64);
  const bool few = columns == 64 && tiles(problem, 128, 64) < multiprocessors;
  return {Kernel::mma, path, few ? 64 : 128, columns};
}

template <typename T>
void launch_choice(const ConvProblem& problem, const Choice& choice, const LaunchTarget& target) {
  switch (choice.kernel) {
    case Kernel::depthwise:
      return launch_conv2d_depthwise<T>(problem, target);
    case Kernel::grouped:
      return launch_conv2d_grouped<T>(problem, target);
    case Kernel::mma:
      return launch_conv2d_mma<T>(problem, choice.path, choice.tile_rows, choice.tile_columns, target);
    case Kernel::simt:
      if constexpr (sizeof(T) == 4) launch_conv2d_simt(problem, choice.path, target);
      return;
    case Kernel::stem:
      if constexpr (sizeof(T) == 2) launch_conv2d_stem<T>(problem, target);
      return;
    case Kernel::stem_wgmma:
      if constexpr (sizeof(T) == 2) launch_conv2d_stem_wgmma<T>(problem, target);
      return;
    case Kernel::wgmma:
      if constexpr (sizeof(T) == 2) launch_conv2d_wgmma<T>(problem, choice.path, choice.tile_columns, target);
      return;
  }
}

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(std::string("fastcnn CUDA conv2d: ") + message);
}

// The images [first, first + count) of the layer.
ConvProblem make_problem(const TensorView& out, const TensorView& input, const void* weight, const Prologue& prologue,
                         const Epilogue& epilogue, const Conv2dGeometry& geometry, int64_t first, int64_t count) {
  const int64_t size = size_in_bytes(input.dtype);
  const int64_t channels = input.c / geometry.groups, filters = out.c / geometry.groups;
  const int64_t reduction = geometry.filter_h * geometry.filter_w * channels;
  ConvProblem problem;
  ConvShape& shape = problem.shape;
  shape.rows = static_cast<int32_t>(count * out.h * out.w);
  shape.reduction = static_cast<int32_t>(reduction);
  shape.channels = static_cast<int32_t>(channels);
  shape.filters = static_cast<int32_t>(filters);
  shape.height = static_cast<int32_t>(input.h);
  shape.width = static_cast<int32_t>(input.w);
  shape.stride_h = static_cast<int32_t>(geometry.stride_h);
  shape.stride_w = static_cast<int32_t>(geometry.stride_w);
  shape.pad_top = static_cast<int32_t>(geometry.pad_top);
  shape.pad_left = static_cast<int32_t>(geometry.pad_left);
  shape.dilation_h = static_cast<int32_t>(geometry.dilation_h);
  shape.dilation_w = static_cast<int32_t>(geometry.dilation_w);
  shape.pixel_stride = input.pixel_stride;
  shape.by_image = FastDivisor(out.h * out.w);
  shape.by_row = FastDivisor(out.w);
  shape.by_channels = FastDivisor(channels);
  shape.by_filter_w = FastDivisor(geometry.filter_w);
  const auto skip = [&](const TensorView& view) {
    return static_cast<char*>(view.data) + first * view.h * view.w * view.pixel_stride * size;
  };
  problem.input = skip(input);
  problem.weight = weight;
  problem.weight_row_stride = reduction;
  problem.input_scale = prologue.scale;
  problem.input_shift = prologue.shift;
  problem.input_relu = prologue.relu;
  problem.relu = epilogue.activation == Activation::relu;
  problem.vector_output = aligned_16(out) && filters * size % 16 == 0;
  problem.scale = epilogue.scale;
  problem.bias = epilogue.bias;
  if (epilogue.residual) {
    problem.residual = skip(epilogue.residual);
    problem.residual_stride = epilogue.residual.pixel_stride;
    problem.vector_output = problem.vector_output && aligned_16(epilogue.residual);
  }
  problem.out = skip(out);
  problem.out_stride = out.pixel_stride;
  problem.groups = static_cast<int32_t>(geometry.groups);
  // Depthwise stores whole vectors of channels, not of one group.
  if (channels == 1 && filters == 1) {
    problem.vector_output = aligned_16(out) && (!epilogue.residual || aligned_16(epilogue.residual));
  }
  return problem;
}

int64_t images_per_launch(const TensorView& out, const TensorView& input, const Conv2dGeometry& geometry) {
  const int64_t reach_h = geometry.dilation_h * (geometry.filter_h - 1) + 1;
  const int64_t reach_w = geometry.dilation_w * (geometry.filter_w - 1) + 1;
  for (const int64_t extent : {input.h, input.w, geometry.pad_top, geometry.pad_left, reach_h, reach_w,
                               (out.h - 1) * geometry.stride_h, (out.w - 1) * geometry.stride_w}) {
    require(extent < kCoordinateLimit, "image, padding and dilated filter must be smaller than 2^28 on each side");
  }
  require(geometry.filter_h * geometry.filter_w * input.c < kRowLimit, "R*S*C must be below 2^30");
  require(input.c < kRowLimit && out.c < kRowLimit, "the numbers of channels must be below 2^30");
  const int64_t pixels = std::max(input.h * input.w, out.h * out.w);
  require(pixels < kRowLimit, "an image must have fewer than 2^30 pixels");
  return std::min(input.n, (kRowLimit - 1) / pixels);
}

}  // namespace

void launch_conv2d(const ConvProblem& problem, DType dtype, bool allow_tf32, const LaunchTarget& target) {
  const Choice choice = choose(problem, dtype, allow_tf32, device_facts(target.device));
  switch (dtype) {
    case DType::f32:
      return launch_choice<float>(problem, choice, target);
    case DType::bf16:
      return launch_choice<__nv_bfloat16>(problem, choice, target);
    case DType::f16:
      return launch_choice<__half>(problem, choice, target);
  }
}

void conv2d(const TensorView& out, const TensorView& input, const void* weight_krsc, const Prologue& prologue,
            const Epilogue& epilogue, const Conv2dGeometry& geometry, bool allow_tf32, int device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t images = images_per_launch(out, input, geometry);
  for (int64_t first = 0; first < input.n; first += images) {
    const ConvProblem problem =
        make_problem(out, input, weight_krsc, prologue, epilogue, geometry, first, std::min(images, input.n - first));
    launch_conv2d(problem, input.dtype, allow_tf32, {device, stream});
  }
}

std::string conv2d_kernel_name(const TensorView& out, const TensorView& input, const void* weight_krsc,
                               const Prologue& prologue, const Epilogue& epilogue, const Conv2dGeometry& geometry,
                               bool allow_tf32, int device) {
  const int64_t images = images_per_launch(out, input, geometry);
  const ConvProblem problem = make_problem(out, input, weight_krsc, prologue, epilogue, geometry, 0, images);
  const Choice choice = choose(problem, input.dtype, allow_tf32, device_facts(device));
  const std::string tile = " " + std::to_string(choice.tile_rows) + "x" + std::to_string(choice.tile_columns);
  const char* path = choice.path == LoadPath::async_vectors    ? ""
                     : choice.path == LoadPath::staged_vectors ? " staged"
                                                               : " elements";
  switch (choice.kernel) {
    case Kernel::depthwise:
      return "depthwise";
    case Kernel::grouped:
      return "grouped";
    case Kernel::simt:
      return std::string("simt") + (choice.path == LoadPath::staged_elements ? " elements" : "");
    case Kernel::stem:
      return "stem";
    case Kernel::stem_wgmma:
      return "stem wgmma";
    case Kernel::wgmma:
      return "wgmma" + tile + path;
    case Kernel::mma:
      return "mma" + tile + path;
  }
  return "unknown";
}

}  // namespace fastcnn::cuda
