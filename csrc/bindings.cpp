// The native module `fastcnn._native`: the only place that knows Python. Each function takes tensors through
// python_tensor.h, checks what memory safety needs, releases the GIL and calls the kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/conv2d_strassen.h"
#include "cpu/conv2d_winograd_cut.h"
#include "cpu/conv2d_winograd_plain.h"
#include "cpu/conv2d_winograd_rows.h"
#include "cpu/kernels.h"
#include "python_tensor.h"

namespace py = pybind11;
using namespace fastcnn;          // NOLINT
using namespace fastcnn::python;  // NOLINT

namespace {

void require_cpu_dtype(const TensorView& view) {
  if (view.dtype == DType::f16) throw py::type_error("input must be float32 or bfloat16 for the CPU kernels");
}

void require_threads(int threads) {
  if (threads < 1) throw py::value_error("threads must be positive, is " + std::to_string(threads));
}

std::shared_ptr<cpu::PackedConv2dWeight> pack_conv2d_weight(py::handle weight, int64_t groups) {
  const Imported t(weight, "weight", kDLCPU);
  t.require_dimensions(4);
  const DType dtype = t.dtype();
  if (dtype == DType::f16) throw py::type_error("weight must be float32 or bfloat16 for the CPU kernels");
  for (int i = 0; i < 4; ++i) {
    if (t.size(i) < 1) throw py::value_error("weight must not be empty, has shape " + describe(t.tensor.shape, 4));
  }
  if (groups < 1 || t.size(0) % groups != 0) {
    throw py::value_error("groups must divide weight's " + std::to_string(t.size(0)) + " output channels, is " +
                          std::to_string(groups));
  }
  py::gil_scoped_release release;
  return std::make_shared<cpu::PackedConv2dWeight>(t.data(), dtype, t.tensor.shape, t.tensor.strides, groups);
}

// Bytes of a packed weight that was kept: values as they are, so the instruction set must be the one it was packed for.
template <typename Weight>
void assign_packed(Weight& weight, const py::buffer_info& info) {
  const int64_t bytes = info.size * info.itemsize;
  if (bytes != weight.bytes()) {
    throw py::value_error("packed must have " + std::to_string(weight.bytes()) + " bytes, has " +
                          std::to_string(bytes));
  }
  weight.assign(info.ptr);
}

template <typename Weight>
py::bytes packed_bytes(const Weight& weight) {
  return py::bytes(reinterpret_cast<const char*>(weight.data()), weight.bytes());
}

void require_packable(const std::array<int64_t, 4>& shape, const py::buffer_info& info) {
  for (const int64_t size : shape) {
    if (size < 1 || size > (int64_t{1} << 24)) throw py::value_error("shape must be positive and at most 2^24");
  }
  const int64_t bytes = info.size * info.itemsize;
  if (shape[0] * shape[1] > bytes / 2 || shape[2] * shape[3] > bytes / 2) {
    throw py::value_error("packed must hold the weight's values");
  }
}

std::shared_ptr<cpu::PackedConv2dWeight> packed_conv2d_weight_from(const py::buffer& packed,
                                                                   const std::array<int64_t, 4>& shape, int64_t groups,
                                                                   const std::string& dtype) {
  const DType packed_dtype = dtype_named(dtype);
  const py::buffer_info info = packed.request();
  require_packable(shape, info);
  if (groups < 1 || shape[0] % groups != 0) throw py::value_error("groups must divide the output channels");
  auto weight = std::make_shared<cpu::PackedConv2dWeight>(packed_dtype, shape.data(), groups);
  assign_packed(*weight, info);
  return weight;
}

void require_positive(const std::array<int64_t, 4>& out_shape) {
  for (const int64_t size : out_shape) {
    if (size < 1) throw py::value_error("out_shape must be positive");
  }
}

// A convolution's operands, of one dtype, with channels and batch as its packed weight and each other have them.
struct Convolution {
  TensorView x, y;
  Prologue prologue;
  Epilogue epilogue;

  template <typename Weight>
  Convolution(py::handle out, py::handle input, const Weight& weight, py::handle scale, py::handle bias,
              py::handle residual, py::handle input_scale, py::handle input_shift, bool input_relu, bool relu)
      : x(activation(input, "input", kDLCPU)) {
    require_cpu_dtype(x);
    y = activation(out, "out", kDLCPU, x.dtype);
    require_shape(x, "input", y.n, weight.in_channels, x.h, x.w);
    require_shape(y, "out", x.n, weight.out_channels, y.h, y.w);
    prologue = prologue_of(x, kDLCPU, input_scale, input_shift, input_relu);
    epilogue = epilogue_of(y, kDLCPU, scale, bias, residual, relu);
  }
};

void cpu_conv2d(py::handle out, py::handle input, const cpu::PackedConv2dWeight& weight, py::handle scale,
                py::handle bias, py::handle residual, py::handle input_scale, py::handle input_shift, bool input_relu,
                bool relu, Pair stride, Pair padding, Pair dilation, int threads) {
  require_threads(threads);
  const Convolution at(out, input, weight, scale, bias, residual, input_scale, input_shift, input_relu, relu);
  const Conv2dGeometry geometry =
      conv2d_geometry(weight.filter_h, weight.filter_w, weight.groups, stride, padding, dilation);
  if (weight.bf16_pairs && at.x.dtype != DType::bf16) {
    throw py::type_error("input must be bfloat16, as the weight that was packed");
  }
  if (at.y.pixels() == 0) return;
  py::gil_scoped_release release;
  cpu::conv2d(at.y, at.x, weight, at.prologue, at.epilogue, geometry, threads);
}

void cpu_conv2d_strassen(py::handle out, py::handle input, const cpu::PackedConv2dWeight& weight, py::handle scale,
                         py::handle bias, py::handle residual, py::handle input_scale, py::handle input_shift,
                         bool input_relu, bool relu, int threads) {
  const TensorView x = activation(input, "input", kDLCPU);
  require_threads(threads);
  const TensorView y = activation(out, "out", kDLCPU, x.dtype);
  if (const char* refusal = cpu::conv2d_strassen_refusal(weight, x.dtype)) throw py::value_error(refusal);
  require_shape(x, "input", y.n, weight.in_channels, y.h, y.w);
  require_shape(y, "out", x.n, weight.out_channels, y.h, y.w);
  const Prologue prologue = prologue_of(x, kDLCPU, input_scale, input_shift, input_relu);
  const Epilogue epilogue = epilogue_of(y, kDLCPU, scale, bias, residual, relu);
  if (y.pixels() == 0) return;
  py::gil_scoped_release release;
  cpu::conv2d_strassen(y, x, weight, prologue, epilogue, threads);
}

double cpu_conv2d_strassen_cycles(const std::array<int64_t, 4>& out_shape, int64_t in_channels) {
  require_positive(out_shape);
  if (in_channels < 2) throw py::value_error("in_channels must be at least 2");
  const auto [n, k, p, q] = out_shape;
  return cpu::conv2d_strassen_cycles(n, p * q, k, in_channels);
}

void require_winograd(const int64_t shape[4], int tile, int stride) {
  if (shape[0] < 1 || shape[1] < 1 || shape[2] != shape[3]) {
    throw py::value_error("weight must have shape (K, C, R, R) and not be empty, has shape " + describe(shape, 4));
  }
  if (stride < 1) throw py::value_error("stride must be positive, is " + std::to_string(stride));
  const int64_t taps = (shape[2] + stride - 1) / stride;
  if (taps < 2 || taps > 5) {
    throw py::value_error("weight must have 2 to 5 rows of taps for each of the input's phases, has " +
                          std::to_string(taps) + " (shape " + describe(shape, 4) + ", stride " +
                          std::to_string(stride) + ")");
  }
  if (!cpu::winograd_has(tile, static_cast<int>(taps))) {
    throw py::value_error("tile must be " +
                          std::string(taps == 3   ? "2, 4 or 6"
                                      : taps == 4 ? "4"
                                      : taps == 5 ? "2 or 4"
                                                  : "2") +
                          " for " + std::to_string(taps) + " taps a phase, is " + std::to_string(tile));
  }
}

std::shared_ptr<cpu::PackedConv2dWinogradWeight> packed_conv2d_winograd_weight_from(const py::buffer& packed,
                                                                                    const std::array<int64_t, 4>& shape,
                                                                                    int tile, int stride,
                                                                                    const std::string& dtype) {
  const DType packed_dtype = dtype_named(dtype);
  const py::buffer_info info = packed.request();
  require_packable(shape, info);
  require_winograd(shape.data(), tile, stride);
  const int filter = static_cast<int>(shape[2]);
  auto weight =
      std::make_shared<cpu::PackedConv2dWinogradWeight>(packed_dtype, shape[0], shape[1], filter, tile, stride);
  assign_packed(*weight, info);
  return weight;
}

std::shared_ptr<cpu::PackedConv2dWinogradWeight> pack_conv2d_winograd_weight(py::handle weight, int tile, int stride) {
  const Imported t(weight, "weight", kDLCPU);
  t.require_dimensions(4);
  const DType dtype = t.dtype();
  if (dtype == DType::f16) throw py::type_error("weight must be float32 or bfloat16 for the CPU kernels");
  require_winograd(t.tensor.shape, tile, stride);
  py::gil_scoped_release release;
  return std::make_shared<cpu::PackedConv2dWinogradWeight>(t.data(), dtype, t.tensor.shape, t.tensor.strides, tile,
                                                           stride);
}

void cpu_conv2d_winograd(py::handle out, py::handle input, const cpu::PackedConv2dWinogradWeight& weight,
                         py::handle scale, py::handle bias, py::handle residual, py::handle input_scale,
                         py::handle input_shift, bool input_relu, bool relu, Pair padding, int threads) {
  require_threads(threads);
  const Convolution at(out, input, weight, scale, bias, residual, input_scale, input_shift, input_relu, relu);
  const Conv2dGeometry geometry =
      conv2d_geometry(weight.filter, weight.filter, 1, {weight.stride, weight.stride}, padding, {1, 1});
  if (weight.bf16_pairs && at.x.dtype != DType::bf16) {
    throw py::type_error("input must be bfloat16, as the weight that was packed");
  }
  if (at.y.pixels() == 0) return;
  py::gil_scoped_release release;
  cpu::conv2d_winograd(at.y, at.x, weight, at.prologue, at.epilogue, geometry, threads);
}

// ---- Winograd with plain weights

void require_plain_winograd(const int64_t shape[4], int64_t groups) {
  if (shape[0] < 1 || shape[1] < 1 || shape[2] != 3 || shape[3] != 3) {
    throw py::value_error("weight must have shape (K, C/groups, 3, 3) and not be empty, has shape " +
                          describe(shape, 4));
  }
  if (groups < 1 || shape[0] % groups != 0 || !cpu::PlainWinogradWeight::covers(shape[0], shape[1] * groups, groups)) {
    throw py::value_error(
        "groups must be 1, divide the channels into whole vectors, or divide as many channels in as out into groups of "
        "4 or more that fill a vector, is " +
        std::to_string(groups));
  }
}

std::shared_ptr<cpu::PlainWinogradWeight> plain_winograd_weight_from(const py::buffer& packed,
                                                                     const std::array<int64_t, 4>& shape,
                                                                     int64_t groups) {
  const py::buffer_info info = packed.request();
  require_packable(shape, info);
  require_plain_winograd(shape.data(), groups);
  auto weight = std::make_shared<cpu::PlainWinogradWeight>(shape[0], shape[1] * groups, groups);
  assign_packed(*weight, info);
  return weight;
}

std::shared_ptr<cpu::PlainWinogradWeight> pack_plain_winograd_weight(py::handle weight, int64_t groups) {
  const Imported t(weight, "weight", kDLCPU);
  t.require_dimensions(4);
  const DType dtype = t.dtype();
  if (dtype == DType::f16) throw py::type_error("weight must be float32 or bfloat16 for the CPU kernels");
  require_plain_winograd(t.tensor.shape, groups);
  py::gil_scoped_release release;
  return std::make_shared<cpu::PlainWinogradWeight>(t.data(), dtype, t.tensor.shape, t.tensor.strides, groups);
}

void cpu_conv2d_winograd_plain(py::handle out, py::handle input, const cpu::PlainWinogradWeight& weight,
                               py::handle scale, py::handle bias, py::handle residual, py::handle input_scale,
                               py::handle input_shift, bool input_relu, bool relu, Pair padding, int threads) {
  require_threads(threads);
  const Convolution at(out, input, weight, scale, bias, residual, input_scale, input_shift, input_relu, relu);
  const Conv2dGeometry geometry = conv2d_geometry(3, 3, weight.groups, {1, 1}, padding, {1, 1});
  if (at.y.pixels() == 0) return;
  py::gil_scoped_release release;
  cpu::run_now(cpu::conv2d_winograd_plain_work(at.y, at.x, weight, at.prologue, at.epilogue, geometry, threads));
}

double cpu_conv2d_winograd_plain_cycles(const std::array<int64_t, 4>& out_shape, int64_t in_channels, int64_t groups) {
  require_positive(out_shape);
  if (in_channels < 1 || groups < 1) throw py::value_error("in_channels and groups must be positive");
  const auto [n, k, p, q] = out_shape;
  return cpu::conv2d_winograd_plain_cycles(n, k, p, q, in_channels, groups);
}

// ---- Winograd along rows

void require_row_winograd(const int64_t shape[4], int stride) {
  if (shape[0] < 1 || shape[1] < 1 || shape[2] != shape[3]) {
    throw py::value_error("weight must have shape (K, C, R, R) and not be empty, has shape " + describe(shape, 4));
  }
  if (!cpu::RowWinogradWeight::covers(shape[2], stride)) {
    throw py::value_error("stride must be 2 to 4 and the weight have 2 to 4 taps a phase, or 1 and 5 taps, stride is " +
                          std::to_string(stride) + ", weight has shape " + describe(shape, 4));
  }
}

std::shared_ptr<cpu::RowWinogradWeight> row_winograd_weight_from(const py::buffer& packed,
                                                                 const std::array<int64_t, 4>& shape, int stride) {
  const py::buffer_info info = packed.request();
  require_packable(shape, info);
  require_row_winograd(shape.data(), stride);
  auto weight = std::make_shared<cpu::RowWinogradWeight>(shape[0], shape[1], static_cast<int>(shape[2]), stride);
  assign_packed(*weight, info);
  return weight;
}

std::shared_ptr<cpu::RowWinogradWeight> pack_row_winograd_weight(py::handle weight, int stride) {
  const Imported t(weight, "weight", kDLCPU);
  t.require_dimensions(4);
  const DType dtype = t.dtype();
  if (dtype == DType::f16) throw py::type_error("weight must be float32 or bfloat16 for the CPU kernels");
  require_row_winograd(t.tensor.shape, stride);
  py::gil_scoped_release release;
  return std::make_shared<cpu::RowWinogradWeight>(t.data(), dtype, t.tensor.shape, t.tensor.strides, stride);
}

void cpu_conv2d_winograd_rows(py::handle out, py::handle input, const cpu::RowWinogradWeight& weight, py::handle scale,
                              py::handle bias, py::handle residual, py::handle input_scale, py::handle input_shift,
                              bool input_relu, bool relu, Pair padding, int threads) {
  require_threads(threads);
  const Convolution at(out, input, weight, scale, bias, residual, input_scale, input_shift, input_relu, relu);
  const Conv2dGeometry geometry =
      conv2d_geometry(weight.filter, weight.filter, 1, {weight.stride, weight.stride}, padding, {1, 1});
  if (at.y.pixels() == 0) return;
  py::gil_scoped_release release;
  cpu::run_now(cpu::conv2d_winograd_rows_work(at.y, at.x, weight, at.prologue, at.epilogue, geometry, threads));
}

double cpu_conv2d_winograd_rows_cycles(const std::array<int64_t, 4>& out_shape, int64_t in_channels, int filter,
                                       int stride) {
  require_positive(out_shape);
  if (in_channels < 1) throw py::value_error("in_channels must be positive");
  const int64_t weight_shape[4] = {out_shape[1], in_channels, filter, filter};
  require_row_winograd(weight_shape, stride);
  const auto [n, k, p, q] = out_shape;
  return cpu::conv2d_winograd_rows_cycles(n, k, p, q, in_channels, filter, stride);
}

double cpu_conv2d_cycles(const std::array<int64_t, 4>& out_shape, int64_t in_channels, int filter, int stride, int tile,
                         bool bf16) {
  require_positive(out_shape);
  if (in_channels < 1) throw py::value_error("in_channels must be positive");
  if (filter < 1) throw py::value_error("filter must be positive");
  const int64_t weight_shape[4] = {out_shape[1], in_channels, filter, filter};
  if (tile != 0) require_winograd(weight_shape, tile, stride);
  const auto [n, k, p, q] = out_shape;
  return cpu::conv2d_cycles(n, k, p, q, in_channels, filter, stride, tile, bf16);
}

// The two views of a pooling, of one dtype, batch and channel count.
struct Pooled {
  TensorView x, y;

  Pooled(py::handle out, py::handle input, int threads)
      : x(activation(input, "input", kDLCPU)), y(activation(out, "out", kDLCPU, x.dtype)) {
    require_cpu_dtype(x);
    require_threads(threads);
    require_shape(y, "out", x.n, x.c, y.h, y.w);
  }

  bool empty() const { return y.pixels() == 0 || y.c == 0; }
};

void cpu_max_pool2d(py::handle out, py::handle input, Pair kernel, Pair stride, Pair padding, Pair dilation,
                    int threads) {
  const Pooled p(out, input, threads);
  const Pool2dGeometry geometry = pool2d_geometry(kernel, stride, padding, dilation);
  if (p.empty()) return;
  py::gil_scoped_release release;
  cpu::max_pool2d(p.y, p.x, geometry, threads);
}

void cpu_avg_pool2d(py::handle out, py::handle input, Pair kernel, Pair stride, Pair padding, Pair padding_end,
                    bool count_include_pad, int64_t divisor, int threads) {
  const Pooled p(out, input, threads);
  const Pool2dGeometry geometry = pool2d_geometry(kernel, stride, padding, {1, 1});
  pool2d_geometry(kernel, stride, padding_end, {1, 1});
  if (p.empty()) return;
  py::gil_scoped_release release;
  cpu::avg_pool2d(p.y, p.x, geometry, padding_end[0], padding_end[1], count_include_pad, divisor, threads);
}

void cpu_adaptive_avg_pool2d(py::handle out, py::handle input, int threads) {
  const Pooled p(out, input, threads);
  if (p.empty()) return;
  py::gil_scoped_release release;
  cpu::adaptive_avg_pool2d(p.y, p.x, threads);
}

void cpu_local_response_norm(py::handle out, py::handle input, int64_t size, float alpha, float beta, float k,
                             int threads) {
  const Pooled p(out, input, threads);
  require_shape(p.y, "out", p.x.n, p.x.c, p.x.h, p.x.w);
  if (size < 1) throw py::value_error("size must be positive, is " + std::to_string(size));
  if (p.empty()) return;
  py::gil_scoped_release release;
  cpu::local_response_norm(p.y, p.x, size, alpha, beta, k, threads);
}

void cpu_linear(py::handle out, py::handle input, py::handle weight, py::handle bias, bool relu, int threads) {
  const TensorView x = matrix(input, "input", kDLCPU), w = matrix(weight, "weight", kDLCPU),
                   y = matrix(out, "out", kDLCPU);
  require_cpu_dtype(x);
  require_threads(threads);
  if (x.dtype != w.dtype || x.dtype != y.dtype) throw py::type_error("input, weight and out must have one dtype");
  require_shape(y, "out", x.n, w.n, 1, 1);
  require_shape(w, "weight", w.n, x.c, 1, 1);
  if (x.c < 1) throw py::value_error("input must have at least one column");
  const float* b = python::vector(bias, "bias", kDLCPU, w.n);
  if (y.n == 0 || y.c == 0) return;
  py::gil_scoped_release release;
  cpu::linear(y, x, w, b, activation_of(relu), threads);
}

void cpu_channel_affine(py::handle out, py::handle input, py::handle scale, py::handle shift, py::handle centre,
                        py::handle residual, bool relu, float factor, int threads) {
  const TensorView x = activation(input, "input", kDLCPU), y = activation(out, "out", kDLCPU, x.dtype);
  require_cpu_dtype(x);
  require_threads(threads);
  require_shape(x, "input", y.n, y.c, y.h, y.w);
  const float* s = python::vector(scale, "scale", kDLCPU, y.c);
  const float* t = python::vector(shift, "shift", kDLCPU, y.c);
  const float* m = python::vector(centre, "centre", kDLCPU, y.c);
  const TensorView r = residual_of(residual, y, kDLCPU);
  if (y.pixels() == 0 || y.c == 0) return;
  py::gil_scoped_release release;
  cpu::channel_affine(y, x, s, t, m, r, activation_of(relu), factor, threads);
}

void cpu_batch_statistics(py::handle mean, py::handle var, py::handle input, int threads) {
  const TensorView x = activation(input, "input", kDLCPU);
  require_cpu_dtype(x);
  require_threads(threads);
  double* m = python::vector<double>(mean, "mean", kDLCPU, x.c);
  double* v = python::vector<double>(var, "var", kDLCPU, x.c);
  if (m == nullptr || v == nullptr) throw py::type_error("mean and var must be tensors");
  if (x.pixels() == 0 || x.c == 0) throw py::value_error("input must not be empty");
  py::gil_scoped_release release;
  cpu::batch_statistics(m, v, x, threads);
}

void cpu_batch_norm_vectors(py::handle centre, py::handle scale, py::handle shift, py::handle mean, py::handle var,
                            py::handle weight, py::handle bias, double eps) {
  const Imported statistic(mean, "mean", kDLCPU);
  statistic.require_dimensions(1);
  const int64_t channels = statistic.size(0);
  float* m = python::vector(centre, "centre", kDLCPU, channels);
  float* s = python::vector(scale, "scale", kDLCPU, channels);
  float* t = python::vector(shift, "shift", kDLCPU, channels);
  const double* average = python::vector<double>(mean, "mean", kDLCPU, channels);
  const double* variance = python::vector<double>(var, "var", kDLCPU, channels);
  const float* w = python::vector(weight, "weight", kDLCPU, channels);
  const float* b = python::vector(bias, "bias", kDLCPU, channels);
  if (m == nullptr || s == nullptr || t == nullptr || variance == nullptr) {
    throw py::type_error("centre, scale, shift and var must be tensors");
  }
  cpu::batch_norm_vectors(m, s, t, average, variance, w, b, eps, channels);
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTCNN_VERSION;
  info["compiler"] = FASTCNN_COMPILER;
  info["openmp"] = FASTCNN_OPENMP != 0;
  info["cuda"] = FASTCNN_CUDA != 0;
  info["cuda_reason"] = FASTCNN_CUDA_REASON;
  info["cuda_architectures"] = FASTCNN_CUDA_ARCHS;
  info["cuda_toolkit"] = FASTCNN_CUDA_TOOLKIT;
  return info;
}

}  // namespace

#if FASTCNN_CUDA
void bind_cuda(py::module_& m);  // bindings_cuda.cpp
#endif

void bind_plan(py::module_& m);    // bindings_plan.cpp
void bind_limits(py::module_& m);  // bindings_limits.cpp
void bind_state(py::module_& m);   // bindings_state.cpp

PYBIND11_MODULE(_native, m) {
  m.doc() = "fastcnn's compiled kernels. Use fastcnn.ops; these functions check memory safety only.";
  m.def("build_info", &build_info);
  m.def("cpu_instruction_set", &cpu::instruction_set);
  m.def("cpu_instruction_sets", &cpu::instruction_sets);
  py::class_<cpu::PackedConv2dWeight, std::shared_ptr<cpu::PackedConv2dWeight>>(m, "PackedConv2dWeight")
      .def(py::init(&pack_conv2d_weight), py::arg("weight"), py::arg("groups"))
      .def_static("from_packed", &packed_conv2d_weight_from, py::arg("packed"), py::arg("shape"), py::arg("groups"),
                  py::arg("dtype"))
      .def("packed", &packed_bytes<cpu::PackedConv2dWeight>)
      .def_property_readonly("bytes", &cpu::PackedConv2dWeight::bytes);
  m.def("cpu_conv2d", &cpu_conv2d, py::arg("out"), py::arg("input"), py::arg("weight"), py::arg("scale"),
        py::arg("bias"), py::arg("residual"), py::arg("input_scale"), py::arg("input_shift"), py::arg("input_relu"),
        py::arg("relu"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("threads"));
  py::class_<cpu::PackedConv2dWinogradWeight, std::shared_ptr<cpu::PackedConv2dWinogradWeight>>(
      m, "PackedConv2dWinogradWeight")
      .def(py::init(&pack_conv2d_winograd_weight), py::arg("weight"), py::arg("tile"), py::arg("stride") = 1)
      .def_static("from_packed", &packed_conv2d_winograd_weight_from, py::arg("packed"), py::arg("shape"),
                  py::arg("tile"), py::arg("stride"), py::arg("dtype"))
      .def("packed", &packed_bytes<cpu::PackedConv2dWinogradWeight>)
      .def("may_pool", &cpu::PackedConv2dWinogradWeight::may_pool, py::arg("height"), py::arg("width"))
      .def_property_readonly("bytes", &cpu::PackedConv2dWinogradWeight::bytes);
  m.def("cpu_conv2d_winograd", &cpu_conv2d_winograd, py::arg("out"), py::arg("input"), py::arg("weight"),
        py::arg("scale"), py::arg("bias"), py::arg("residual"), py::arg("input_scale"), py::arg("input_shift"),
        py::arg("input_relu"), py::arg("relu"), py::arg("padding"), py::arg("threads"));
  py::class_<cpu::PlainWinogradWeight, std::shared_ptr<cpu::PlainWinogradWeight>>(m, "PlainWinogradWeight")
      .def(py::init(&pack_plain_winograd_weight), py::arg("weight"), py::arg("groups"))
      .def_static("from_packed", &plain_winograd_weight_from, py::arg("packed"), py::arg("shape"), py::arg("groups"))
      .def_static("covers", &cpu::PlainWinogradWeight::covers, py::arg("out_channels"), py::arg("in_channels"),
                  py::arg("groups"))
      .def("packed", &packed_bytes<cpu::PlainWinogradWeight>)
      .def_property_readonly("bytes", &cpu::PlainWinogradWeight::bytes);
  m.def("cpu_conv2d_winograd", &cpu_conv2d_winograd_plain, py::arg("out"), py::arg("input"), py::arg("weight"),
        py::arg("scale"), py::arg("bias"), py::arg("residual"), py::arg("input_scale"), py::arg("input_shift"),
        py::arg("input_relu"), py::arg("relu"), py::arg("padding"), py::arg("threads"));
  py::class_<cpu::RowWinogradWeight, std::shared_ptr<cpu::RowWinogradWeight>>(m, "RowWinogradWeight")
      .def(py::init(&pack_row_winograd_weight), py::arg("weight"), py::arg("stride"))
      .def_static("from_packed", &row_winograd_weight_from, py::arg("packed"), py::arg("shape"), py::arg("stride"))
      .def("packed", &packed_bytes<cpu::RowWinogradWeight>)
      .def_property_readonly("bytes", &cpu::RowWinogradWeight::bytes);
  m.def("cpu_conv2d_winograd", &cpu_conv2d_winograd_rows, py::arg("out"), py::arg("input"), py::arg("weight"),
        py::arg("scale"), py::arg("bias"), py::arg("residual"), py::arg("input_scale"), py::arg("input_shift"),
        py::arg("input_relu"), py::arg("relu"), py::arg("padding"), py::arg("threads"));
  m.def("cpu_conv2d_winograd_rows_cycles", &cpu_conv2d_winograd_rows_cycles, py::arg("out_shape"),
        py::arg("in_channels"), py::arg("filter"), py::arg("stride"));
  m.def("cpu_conv2d_winograd_plain_cycles", &cpu_conv2d_winograd_plain_cycles, py::arg("out_shape"),
        py::arg("in_channels"), py::arg("groups"));
  m.def("cpu_conv2d_strassen", &cpu_conv2d_strassen, py::arg("out"), py::arg("input"), py::arg("weight"),
        py::arg("scale"), py::arg("bias"), py::arg("residual"), py::arg("input_scale"), py::arg("input_shift"),
        py::arg("input_relu"), py::arg("relu"), py::arg("threads"));
  m.def("cpu_conv2d_strassen_cycles", &cpu_conv2d_strassen_cycles, py::arg("out_shape"), py::arg("in_channels"));
  m.def("cpu_conv2d_cycles", &cpu_conv2d_cycles, py::arg("out_shape"), py::arg("in_channels"), py::arg("filter"),
        py::arg("stride"), py::arg("tile"), py::arg("bf16"));
  m.def("cpu_max_pool2d", &cpu_max_pool2d, py::arg("out"), py::arg("input"), py::arg("kernel"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("threads"));
  m.def("cpu_avg_pool2d", &cpu_avg_pool2d, py::arg("out"), py::arg("input"), py::arg("kernel"), py::arg("stride"),
        py::arg("padding"), py::arg("padding_end"), py::arg("count_include_pad"), py::arg("divisor"),
        py::arg("threads"));
  m.def("cpu_adaptive_avg_pool2d", &cpu_adaptive_avg_pool2d, py::arg("out"), py::arg("input"), py::arg("threads"));
  m.def("cpu_local_response_norm", &cpu_local_response_norm, py::arg("out"), py::arg("input"), py::arg("size"),
        py::arg("alpha"), py::arg("beta"), py::arg("k"), py::arg("threads"));
  m.def("cpu_linear", &cpu_linear, py::arg("out"), py::arg("input"), py::arg("weight"), py::arg("bias"),
        py::arg("relu"), py::arg("threads"));
  m.def("cpu_channel_affine", &cpu_channel_affine, py::arg("out"), py::arg("input"), py::arg("scale"), py::arg("shift"),
        py::arg("centre"), py::arg("residual"), py::arg("relu"), py::arg("factor"), py::arg("threads"));
  m.def("cpu_batch_norm_vectors", &cpu_batch_norm_vectors, py::arg("centre"), py::arg("scale"), py::arg("shift"),
        py::arg("mean"), py::arg("var"), py::arg("weight"), py::arg("bias"), py::arg("eps"));
  m.def("cpu_batch_statistics", &cpu_batch_statistics, py::arg("mean"), py::arg("var"), py::arg("input"),
        py::arg("threads"));
  bind_plan(m);
  bind_limits(m);
  bind_state(m);
#if FASTCNN_CUDA
  bind_cuda(m);
#endif
}
