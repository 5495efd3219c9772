// Convolution: from the caller's views to the problem that kernels receive, and the launch of the chosen kernel
// (conv2d_choice.h).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "conv2d_choice.h"
#include "conv2d_problem.h"
#include "conv2d_stem_plan.h"
#include "host.h"
#include "kernels.h"

namespace fastcnn::cuda {
namespace {

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
    case Kernel::patch:
      if constexpr (sizeof(T) == 2) launch_conv2d_patch<T>(problem, choice.tile_columns, target);
      return;
    case Kernel::patch_held:
      if constexpr (sizeof(T) == 2) launch_conv2d_patch_held<T>(problem, target);
      return;
    case Kernel::tma:
      if constexpr (sizeof(T) == 2) {
        if (choice.split > 1) return launch_conv2d_tma_split<T>(problem, choice.tile_columns, choice.split, target);
        launch_conv2d_tma<T>(problem, choice.tile_rows, choice.tile_columns, choice.in_turns, choice.block, target);
      }
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

Choice named(const std::string& kernel, const ConvProblem& problem, DType dtype, bool allow_tf32,
             const DeviceFacts& device) {
  if (kernel.empty()) return choose(problem, dtype, allow_tf32, device);
  for (const Choice& choice : choices(problem, dtype, allow_tf32, device)) {
    if (name_of(choice) == kernel) return choice;
  }
  throw std::invalid_argument("kernel '" + kernel + "' does not serve this convolution");
}

void launch_as(const Choice& choice, const ConvProblem& problem, DType dtype, const LaunchTarget& target) {
  switch (dtype) {
    case DType::f32:
      return launch_choice<float>(problem, choice, target);
    case DType::bf16:
      return launch_choice<__nv_bfloat16>(problem, choice, target);
    case DType::f16:
      return launch_choice<__half>(problem, choice, target);
  }
}

}  // namespace

void launch_conv2d(const ConvProblem& problem, DType dtype, bool allow_tf32, const LaunchTarget& target) {
  launch_as(choose(problem, dtype, allow_tf32, device_facts(target.device)), problem, dtype, target);
}

void conv2d(const TensorView& out, const TensorView& input, const void* weight_krsc, const Prologue& prologue,
            const Epilogue& epilogue, const Conv2dGeometry& geometry, bool allow_tf32, int device, void* stream,
            const std::string& kernel) {
  const DeviceGuard guard(device);
  const int64_t images = images_per_launch(out, input, geometry);
  for (int64_t first = 0; first < input.n; first += images) {
    const ConvProblem problem =
        make_problem(out, input, weight_krsc, prologue, epilogue, geometry, first, std::min(images, input.n - first));
    const Choice choice = named(kernel, problem, input.dtype, allow_tf32, device_facts(device));
    launch_as(choice, problem, input.dtype, {device, stream});
  }
}

void conv2d_max_pool2d(const TensorView& out, const TensorView& input, const void* weight_krsc,
                       const Epilogue& epilogue, const Conv2dGeometry& geometry, int64_t conv_h, int64_t conv_w,
                       const Pool2dGeometry& pooling, int device, void* stream) {
  const auto need = [](bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(std::string("fastcnn CUDA conv2d_max_pool2d: ") + message);
  };
  need(pooling.kernel_h == 3 && pooling.kernel_w == 3 && pooling.stride_h == 2 && pooling.stride_w == 2 &&
           pooling.dilation_h == 1 && pooling.dilation_w == 1 && pooling.pad_top <= 1 && pooling.pad_left <= 1,
       "windows must be 3x3 with stride 2, padding 0 or 1 and no dilation");
  need(conv_h > 0 && conv_w > 0 && out.h <= conv_h && out.w <= conv_w,
       "out must not be larger than the convolution's output");
  need(input.dtype != DType::f32 && !epilogue.residual, "input must be bf16 or fp16, and there may be no residual");
  need(aligned_16(out) && out.c % 8 == 0, "out and its pixels must be aligned to 16 bytes");
  const DeviceGuard guard(device);
  TensorView between = out;
  between.data = nullptr, between.h = conv_h, between.w = conv_w, between.pixel_stride = out.c;
  const int64_t images = images_per_launch(between, input, geometry);
  for (int64_t first = 0; first < input.n; first += images) {
    ConvProblem problem =
        make_problem(between, input, weight_krsc, {}, epilogue, geometry, first, std::min(images, input.n - first));
    problem.out = static_cast<char*>(out.data) + first * out.h * out.w * out.pixel_stride * size_in_bytes(out.dtype);
    problem.out_stride = out.pixel_stride;
    StemPoolPlan plan;
    plan.out_h = static_cast<int32_t>(out.h), plan.out_w = static_cast<int32_t>(out.w);
    plan.pad_top = static_cast<int32_t>(pooling.pad_top), plan.pad_left = static_cast<int32_t>(pooling.pad_left);
    need(make_stem_pool_plan(plan, problem, device_facts(device)),
         "the convolution must be one that the kernel 'stem wgmma' serves");
    if (input.dtype == DType::bf16) {
      launch_conv2d_stem_pool<__nv_bfloat16>(problem, plan, {device, stream});
    } else {
      launch_conv2d_stem_pool<__half>(problem, plan, {device, stream});
    }
  }
}

std::vector<std::string> conv2d_kernel_names(const TensorView& out, const TensorView& input, const void* weight_krsc,
                                             const Prologue& prologue, const Epilogue& epilogue,
                                             const Conv2dGeometry& geometry, bool allow_tf32, int device) {
  const int64_t images = images_per_launch(out, input, geometry);
  const ConvProblem problem = make_problem(out, input, weight_krsc, prologue, epilogue, geometry, 0, images);
  std::vector<std::string> names;
  for (const Choice& choice : choices(problem, input.dtype, allow_tf32, device_facts(device))) {
    names.push_back(name_of(choice));
  }
  return names;
}

}  // namespace fastcnn::cuda
