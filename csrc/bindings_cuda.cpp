// The CUDA half of the native module; built only with the CUDA kernels. Same duties as bindings.cpp: check what memory
// safety needs, take the caller's stream and device, release the GIL, launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/kernels.h"
#include "python_tensor.h"

namespace py = pybind11;
using namespace fastcnn;          // NOLINT
using namespace fastcnn::python;  // NOLINT

namespace {

// The GPU of `out` and the stream that torch launches on there; every other tensor must be on the same GPU.
struct Launch {
  int device;
  Place place;
  void* stream = nullptr;

  explicit Launch(py::handle out) : device(device_of(out)), place(kDLCUDA, device) {
    if (exchange_api_of(out, "out")->current_work_stream(kDLCUDA, device, &stream) != 0) throw py::error_already_set();
  }

  static int device_of(py::handle tensor) {
    DLTensor t;
    if (exchange_api_of(tensor, "out")->dltensor_from_py_object_no_sync(tensor.ptr(), &t) != 0) {
      throw py::error_already_set();
    }
    if (t.device.device_type != kDLCUDA) throw py::value_error("out must be on a GPU");
    return t.device.device_id;
  }
};

void require_same_shape(const TensorView& input, const TensorView& out) {
  require_shape(input, "input", out.n, out.c, out.h, out.w);
}

// The weight of a convolution from x to k channels, (K, R, S, C/groups) in memory.
Imported krsc_weight(py::handle weight, const TensorView& x, const TensorView& y, int64_t groups, const Place& place) {
  const Imported w(weight, "weight", place);
  w.require_dimensions(4);
  w.dtype(x.dtype);
  const int64_t k = w.size(0), c = w.size(1), r = w.size(2), s = w.size(3);
  const bool packed = (c == 1 || w.stride(1) == 1) && (s == 1 || w.stride(3) == c) &&
                      (r == 1 || w.stride(2) == s * c) && (k == 1 || w.stride(0) == r * s * c);
  if (!packed) throw py::value_error("weight must be contiguous in channels-last order (K, R, S, C/groups)");
  if (groups < 1 || k < 1 || c < 1 || r < 1 || s < 1 || k % groups != 0) {
    throw py::value_error("groups must divide weight's output channels, none of its sizes may be 0");
  }
  require_shape(x, "input", y.n, c * groups, x.h, x.w);
  require_shape(y, "out", x.n, k, y.h, y.w);
  return w;
}

void conv2d(py::handle out, py::handle input, py::handle weight, py::handle scale, py::handle bias, py::handle residual,
            py::handle input_scale, py::handle input_shift, bool input_relu, bool relu, Pair stride, Pair padding,
            Pair dilation, int64_t groups, bool allow_tf32, const std::string& kernel) {
  const Launch launch(out);
  const TensorView x = activation(input, "input", launch.place);
  const TensorView y = activation(out, "out", launch.place, x.dtype);
  const Imported w = krsc_weight(weight, x, y, groups, launch.place);
  const Prologue prologue = prologue_of(x, launch.place, input_scale, input_shift, input_relu);
  const Epilogue epilogue = epilogue_of(y, launch.place, scale, bias, residual, relu);
  const Conv2dGeometry geometry = conv2d_geometry(w.size(2), w.size(3), groups, stride, padding, dilation);
  if (y.pixels() == 0) return;
  py::gil_scoped_release release;
  cuda::conv2d(y, x, w.data(), prologue, epilogue, geometry, allow_tf32, launch.device, launch.stream, kernel);
}

// `size`: the convolution's output size.
void conv2d_max_pool2d(py::handle out, py::handle input, py::handle weight, py::handle scale, py::handle bias,
                       bool relu, Pair stride, Pair padding, Pair dilation, int64_t groups, Pair size, Pair kernel,
                       Pair pool_stride, Pair pool_padding, Pair pool_dilation) {
  const Launch launch(out);
  const TensorView x = activation(input, "input", launch.place);
  const TensorView y = activation(out, "out", launch.place, x.dtype);
  const Imported w = krsc_weight(weight, x, y, groups, launch.place);
  const Epilogue epilogue = epilogue_of(y, launch.place, scale, bias, py::none(), relu);
  const Conv2dGeometry geometry = conv2d_geometry(w.size(2), w.size(3), groups, stride, padding, dilation);
  const Pool2dGeometry pooling = pool2d_geometry(kernel, pool_stride, pool_padding, pool_dilation);
  if (y.pixels() == 0) return;
  py::gil_scoped_release release;
  cuda::conv2d_max_pool2d(y, x, w.data(), epilogue, geometry, size[0], size[1], pooling, launch.device, launch.stream);
}

// The arguments of a pair of 1x1 convolutions, checked.
struct Pair1x1 {
  Launch launch;
  cuda::Conv1x1Pair pair;

  Pair1x1(py::handle wide, py::handle narrow, py::handle input, py::handle residual, py::handle expand_weight,
          py::handle expand_scale, py::handle expand_bias, py::handle reduce_weight, py::handle reduce_scale,
          py::handle reduce_bias)
      : launch(wide) {
    const Place& place = launch.place;
    pair.input = activation(input, "input", place);
    pair.wide = activation(wide, "wide", place, pair.input.dtype);
    pair.narrow = activation(narrow, "narrow", place, pair.input.dtype);
    const TensorView &x = pair.input, &y = pair.wide, &z = pair.narrow;
    require_shape(y, "wide", x.n, y.c, x.h, x.w);
    require_shape(z, "narrow", x.n, z.c, x.h, x.w);
    if (residual.is_none()) throw py::type_error("residual must be a torch.Tensor, not NoneType");
    pair.residual = residual_of(residual, y, place);
    pair.expand_weight = matrix_of(expand_weight, "expand_weight", place, x.dtype, y.c, x.c);
    pair.reduce_weight = matrix_of(reduce_weight, "reduce_weight", place, x.dtype, z.c, y.c);
    pair.expand_scale = python::vector(expand_scale, "expand_scale", place, y.c);
    pair.expand_bias = python::vector(expand_bias, "expand_bias", place, y.c);
    pair.reduce_scale = python::vector(reduce_scale, "reduce_scale", place, z.c);
    pair.reduce_bias = python::vector(reduce_bias, "reduce_bias", place, z.c);
  }

  // A contiguous (filters, channels, 1, 1) weight.
  static const void* matrix_of(py::handle weight, const char* name, const Place& place, DType dtype, int64_t filters,
                               int64_t channels) {
    const Imported w(weight, name, place);
    w.require_dimensions(4);
    w.dtype(dtype);
    const bool shape = w.size(0) == filters && w.size(1) == channels && w.size(2) == 1 && w.size(3) == 1;
    const bool packed = (channels == 1 || w.stride(1) == 1) && (filters == 1 || w.stride(0) == channels);
    if (!shape || !packed) {
      throw py::value_error(std::string(name) + " must be contiguous with shape (" + std::to_string(filters) + ", " +
                            std::to_string(channels) + ", 1, 1)");
    }
    return w.data();
  }
};

void conv2d_1x1_pair(py::handle wide, py::handle narrow, py::handle input, py::handle residual,
                     py::handle expand_weight, py::handle expand_scale, py::handle expand_bias,
                     py::handle reduce_weight, py::handle reduce_scale, py::handle reduce_bias) {
  const Pair1x1 p(wide, narrow, input, residual, expand_weight, expand_scale, expand_bias, reduce_weight, reduce_scale,
                  reduce_bias);
  if (p.pair.input.pixels() == 0) return;
  py::gil_scoped_release release;
  cuda::conv2d_1x1_pair(p.pair, p.launch.device, p.launch.stream);
}

// Why the kernel cannot serve the same arguments; empty when it can.
std::string conv2d_1x1_pair_unsupported(py::handle wide, py::handle narrow, py::handle input, py::handle residual,
                                        py::handle expand_weight, py::handle expand_scale, py::handle expand_bias,
                                        py::handle reduce_weight, py::handle reduce_scale, py::handle reduce_bias) {
  const Pair1x1 p(wide, narrow, input, residual, expand_weight, expand_scale, expand_bias, reduce_weight, reduce_scale,
                  reduce_bias);
  return cuda::conv2d_1x1_pair_unsupported(p.pair, p.launch.device);
}

void linear(py::handle out, py::handle input, py::handle weight, py::handle bias, bool relu, bool allow_tf32) {
  const Launch launch(out);
  const TensorView x = matrix(input, "input", launch.place), w = matrix(weight, "weight", launch.place),
                   y = matrix(out, "out", launch.place);
  if (x.dtype != w.dtype || x.dtype != y.dtype) throw py::type_error("input, weight and out must have one dtype");
  require_shape(y, "out", x.n, w.n, 1, 1);
  require_shape(w, "weight", w.n, x.c, 1, 1);
  const float* b = python::vector(bias, "bias", launch.place, w.n);
  if (y.n == 0 || y.c == 0) return;
  py::gil_scoped_release release;
  cuda::linear(y, x, w, b, activation_of(relu), allow_tf32, launch.device, launch.stream);
}

void channel_affine(py::handle out, py::handle input, py::handle scale, py::handle shift, py::handle centre,
                    py::handle residual, bool relu) {
  const Launch launch(out);
  const TensorView x = activation(input, "input", launch.place), y = activation(out, "out", launch.place, x.dtype);
  require_same_shape(x, y);
  const float* s = python::vector(scale, "scale", launch.place, y.c);
  const float* t = python::vector(shift, "shift", launch.place, y.c);
  const float* m = python::vector(centre, "centre", launch.place, y.c);
  const TensorView r = residual_of(residual, y, launch.place);
  if (y.pixels() == 0) return;
  py::gil_scoped_release release;
  cuda::channel_affine(y, x, s, t, m, r, activation_of(relu), launch.device, launch.stream);
}

void residual_add(py::handle out, py::handle input, py::handle residual, float scale, bool relu) {
  const Launch launch(out);
  const TensorView x = activation(input, "input", launch.place), y = activation(out, "out", launch.place, x.dtype);
  require_same_shape(x, y);
  if (residual.is_none()) throw py::type_error("residual must be a torch.Tensor, not NoneType");
  const TensorView r = residual_of(residual, y, launch.place);
  if (y.pixels() == 0) return;
  py::gil_scoped_release release;
  cuda::residual_add(y, x, r, scale, activation_of(relu), launch.device, launch.stream);
}

// Bytes of fp32 workspace that batch_statistics needs for this input.
int64_t batch_statistics_workspace(py::handle input) {
  return static_cast<int64_t>(cuda::batch_statistics_workspace_bytes(activation(input, "input", Launch(input).place)));
}

void batch_statistics(py::handle mean, py::handle var, py::handle input, py::handle workspace) {
  const Launch launch(input);
  const TensorView x = activation(input, "input", launch.place);
  if (x.pixels() == 0) throw py::value_error("input must not be empty");
  float* m = python::vector(mean, "mean", launch.place, x.c);
  float* v = python::vector(var, "var", launch.place, x.c);
  const auto floats = static_cast<int64_t>((cuda::batch_statistics_workspace_bytes(x) + 3) / 4);
  float* w = python::vector(workspace, "workspace", launch.place, floats);
  if (m == nullptr || v == nullptr || (floats > 0 && w == nullptr))
    throw py::type_error("mean, var and workspace must be tensors");
  py::gil_scoped_release release;
  cuda::batch_statistics(m, v, x, w, launch.device, launch.stream);
}

struct Pooled {
  Launch launch;
  TensorView x, y;
  Pooled(py::handle out, py::handle input)
      : launch(out), x(activation(input, "input", launch.place)), y(activation(out, "out", launch.place, x.dtype)) {
    require_shape(y, "out", x.n, x.c, y.h, y.w);
  }
};

void max_pool2d(py::handle out, py::handle input, Pair kernel, Pair stride, Pair padding, Pair dilation) {
  const Pooled p(out, input);
  const Pool2dGeometry geometry = pool2d_geometry(kernel, stride, padding, dilation);
  if (p.y.pixels() == 0) return;
  py::gil_scoped_release release;
  cuda::max_pool2d(p.y, p.x, geometry, p.launch.device, p.launch.stream);
}

void avg_pool2d(py::handle out, py::handle input, Pair kernel, Pair stride, Pair padding, Pair padding_end,
                bool count_include_pad, int64_t divisor) {
  const Pooled p(out, input);
  const Pool2dGeometry geometry = pool2d_geometry(kernel, stride, padding, {1, 1});
  if (p.y.pixels() == 0) return;
  py::gil_scoped_release release;
  cuda::avg_pool2d(p.y, p.x, geometry, padding_end[0], padding_end[1], count_include_pad, divisor, p.launch.device,
                   p.launch.stream);
}

void adaptive_avg_pool2d(py::handle out, py::handle input) {
  const Pooled p(out, input);
  if (p.y.pixels() == 0) return;
  py::gil_scoped_release release;
  cuda::adaptive_avg_pool2d(p.y, p.x, p.launch.device, p.launch.stream);
}

void local_response_norm(py::handle out, py::handle input, int64_t size, float alpha, float beta, float k) {
  const Pooled p(out, input);
  require_same_shape(p.x, p.y);
  if (size < 1) throw py::value_error("size must be positive, is " + std::to_string(size));
  if (p.y.pixels() == 0) return;
  py::gil_scoped_release release;
  cuda::local_response_norm(p.y, p.x, size, alpha, beta, k, p.launch.device, p.launch.stream);
}

// Which kernels can serve conv2d, the one that it would launch first: for the tuner, reports and tests.
std::vector<std::string> conv2d_kernels(py::handle out, py::handle input, py::handle weight, py::handle residual,
                                        bool has_prologue, Pair stride, Pair padding, Pair dilation, int64_t groups,
                                        bool allow_tf32) {
  const Launch launch(out);
  const TensorView x = activation(input, "input", launch.place), y = activation(out, "out", launch.place, x.dtype);
  const Imported w(weight, "weight", launch.place);
  w.require_dimensions(4);
  if (y.pixels() == 0 || x.pixels() == 0) return {};
  Prologue prologue;
  prologue.relu = has_prologue;
  Epilogue epilogue;
  epilogue.residual = residual_of(residual, y, launch.place);
  return cuda::conv2d_kernel_names(y, x, w.data(), prologue, epilogue,
                                   conv2d_geometry(w.size(2), w.size(3), groups, stride, padding, dilation), allow_tf32,
                                   launch.device);
}

py::dict device_info(int device) {
  const cuda::DeviceInfo info = cuda::device_info(device);
  py::dict d;
  d["name"] = info.name;
  d["compute_capability"] = py::make_tuple(info.compute_major, info.compute_minor);
  d["multiprocessors"] = info.multiprocessors;
  d["memory_bytes"] = info.memory_bytes;
  d["l2_bytes"] = info.l2_bytes;
  d["supported"] = info.supported;
  return d;
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_device_count", &cuda::device_count);
  m.def("cuda_device_info", &device_info, py::arg("device"));
  m.def("cuda_architectures", &cuda::compiled_architectures);
  m.def("cuda_runtime_version", &cuda::runtime_version);
  m.def("cuda_driver_version", &cuda::driver_version);
  m.def("cuda_conv2d", &conv2d, py::arg("out"), py::arg("input"), py::arg("weight"), py::arg("scale"), py::arg("bias"),
        py::arg("residual"), py::arg("input_scale"), py::arg("input_shift"), py::arg("input_relu"), py::arg("relu"),
        py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("allow_tf32"),
        py::arg("kernel") = "");
  m.def("cuda_conv2d_kernels", &conv2d_kernels);
  m.def("cuda_set_early_starts", &cuda::set_early_starts, py::arg("on"));
  m.def("cuda_conv2d_max_pool2d", &conv2d_max_pool2d);
  m.def("cuda_conv2d_1x1_pair", &conv2d_1x1_pair);
  m.def("cuda_conv2d_1x1_pair_unsupported", &conv2d_1x1_pair_unsupported);
  m.def("cuda_conv2d_1x1_pair_weights", &cuda::conv2d_1x1_pair_weights);
  m.def("cuda_linear", &linear);
  m.def("cuda_channel_affine", &channel_affine);
  m.def("cuda_residual_add", &residual_add);
  m.def("cuda_batch_statistics_workspace", &batch_statistics_workspace);
  m.def("cuda_batch_statistics", &batch_statistics);
  m.def("cuda_max_pool2d", &max_pool2d);
  m.def("cuda_avg_pool2d", &avg_pool2d);
  m.def("cuda_adaptive_avg_pool2d", &adaptive_avg_pool2d);
  m.def("cuda_local_response_norm", &local_response_norm);
}
