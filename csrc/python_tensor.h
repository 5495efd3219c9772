// Tensors coming in from Python, through DLPack's C exchange API, checked before any pointer is used.
// Errors name the argument, what it was and what it must be: ValueError for shapes and strides, TypeError for types.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "common/dlpack.h"
#include "common/types.h"

namespace fastcnn::python {

namespace py = pybind11;

inline const DLPackExchangeAPI* exchange_api_of(py::handle object, const char* name) {
  static PyTypeObject* known_type = nullptr;  // torch.Tensor or torch.nn.Parameter: they share one table
  static const DLPackExchangeAPI* known_api = nullptr;
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (type == known_type) return known_api;
  py::handle type_object(reinterpret_cast<PyObject*>(type));
  if (!py::hasattr(type_object, "__dlpack_c_exchange_api__")) {
    throw py::type_error(std::string(name) + " must be a torch.Tensor, not " +
                         py::str(type_object.attr("__name__")).cast<std::string>());
  }
  py::object capsule = type_object.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->header.version.major != 1 || api->dltensor_from_py_object_no_sync == nullptr) {
    throw std::runtime_error("this torch offers DLPack " + std::to_string(api->header.version.major) +
                             "; fastcnn needs version 1 with dltensor_from_py_object_no_sync");
  }
  known_type = type;
  known_api = api;
  return api;
}

inline std::string describe(const int64_t* values, int count) {
  std::string text = "(";
  for (int i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  return text + ")";
}

// Where tensors of one call must live.
struct Place {
  DLDeviceType type;
  int32_t index;
  Place(DLDeviceType type, int32_t index = 0) : type(type), index(index) {}  // NOLINT: kDLCPU is a place
};

struct Imported {
  DLTensor tensor;
  const char* name;

  Imported(const DLTensor& tensor, const char* name) : tensor(tensor), name(name) {}  // a description without Python

  Imported(py::handle object, const char* name, Place place) : name(name) {
    if (exchange_api_of(object, name)->dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) {
      throw py::error_already_set();
    }
    if (tensor.device.device_type != place.type || (place.type == kDLCUDA && tensor.device.device_id != place.index)) {
      throw py::value_error(std::string(name) + " must be on " +
                            (place.type == kDLCPU ? "the CPU" : "GPU " + std::to_string(place.index)));
    }
    if (tensor.data == nullptr) {  // FSDP and others free a tensor's storage and keep its shape
      int64_t count = 1;
      for (int i = 0; i < tensor.ndim; ++i) count *= tensor.shape[i];
      if (count > 0) throw py::value_error(std::string(name) + " must have memory; its storage was freed");
    }
  }

  void* data() const { return static_cast<char*>(tensor.data) + tensor.byte_offset; }
  int64_t size(int i) const { return tensor.shape[i]; }
  int64_t stride(int i) const { return tensor.strides[i]; }

  void require_dimensions(int count) const {
    if (tensor.ndim == count) return;
    throw py::value_error(std::string(name) + " must have " + std::to_string(count) + " dimensions, has shape " +
                          describe(tensor.shape, tensor.ndim));
  }

  DType dtype() const {
    const DLDataType type = tensor.dtype;
    if (type.lanes == 1) {
      if (type.code == kDLFloat && type.bits == 32) return DType::f32;
      if (type.code == kDLFloat && type.bits == 16) return DType::f16;
      if (type.code == kDLBfloat && type.bits == 16) return DType::bf16;
    }
    throw py::type_error(std::string(name) + " must be float32, bfloat16 or float16");
  }

  DType dtype(DType expected) const {
    const DType actual = dtype();
    if (actual != expected) throw py::type_error(std::string(name) + " must have the input's dtype");
    return actual;
  }
};

// A 4-D tensor whose pixels lie in channels-last order.
inline TensorView activation(const Imported& t) {
  t.require_dimensions(4);
  TensorView view;
  view.data = t.data();
  view.dtype = t.dtype();
  view.n = t.size(0), view.c = t.size(1), view.h = t.size(2), view.w = t.size(3);
  // Strides of size-1 dimensions mean nothing: the pixel stride is that of the innermost dimension that has one.
  view.pixel_stride = view.w > 1 ? t.stride(3) : view.h > 1 ? t.stride(2) : view.n > 1 ? t.stride(0) : view.c;
  const bool fits = (view.c == 1 || t.stride(1) == 1) && view.pixel_stride >= view.c &&
                    (view.h == 1 || t.stride(2) == view.w * view.pixel_stride) &&
                    (view.n == 1 || t.stride(0) == view.h * view.w * view.pixel_stride);
  if (!fits) {
    throw py::value_error(std::string(t.name) +
                          " must be in channels-last memory, possibly a channel slice of it; it has shape " +
                          describe(t.tensor.shape, 4) + " and strides " + describe(t.tensor.strides, 4));
  }
  return view;
}

inline TensorView activation(py::handle object, const char* name, Place place) {
  return activation(Imported(object, name, place));
}

inline TensorView activation(py::handle object, const char* name, Place place, DType dtype) {
  const Imported t(object, name, place);
  t.dtype(dtype);
  return activation(t);
}

inline void require_shape(const TensorView& view, const char* name, int64_t n, int64_t c, int64_t h, int64_t w) {
  if (view.n == n && view.c == c && view.h == h && view.w == w) return;
  const int64_t actual[4] = {view.n, view.c, view.h, view.w}, expected[4] = {n, c, h, w};
  throw py::value_error(std::string(name) + " must have shape " + describe(expected, 4) + ", has " +
                        describe(actual, 4));
}

// None, or a 1-D contiguous tensor of fp32 (or float64) values of a given length.
template <typename T = float>
T* vector(py::handle object, const char* name, Place place, int64_t length) {
  if (object.is_none()) return nullptr;
  const Imported t(object, name, place);
  t.require_dimensions(1);
  const DLDataType type = t.tensor.dtype;
  if (type.lanes != 1 || type.code != kDLFloat || type.bits != 8 * sizeof(T)) {
    throw py::type_error(std::string(name) + " must be float" + std::to_string(8 * sizeof(T)));
  }
  if (t.size(0) != length || (length > 1 && t.stride(0) != 1)) {
    throw py::value_error(std::string(name) + " must be contiguous with " + std::to_string(length) + " values, has " +
                          std::to_string(t.size(0)));
  }
  return static_cast<T*>(t.data());
}

// A 2-D tensor with adjacent columns, as a view of n rows.
inline TensorView matrix(py::handle object, const char* name, Place place) {
  const Imported t(object, name, place);
  t.require_dimensions(2);
  if ((t.size(1) > 1 && t.stride(1) != 1) || (t.size(0) > 1 && t.stride(0) < t.size(1))) {
    throw py::value_error(std::string(name) + " must have adjacent columns, has strides " +
                          describe(t.tensor.strides, 2));
  }
  return {t.data(), t.dtype(), t.size(0), 1, 1, t.size(1), t.size(0) > 1 ? t.stride(0) : t.size(1)};
}

// ---- small arguments ----------------------------------------------------------------------------------------------

// A packed weight's dtype by its name in Python.
inline DType dtype_named(const std::string& name) {
  if (name != "float32" && name != "bfloat16") throw py::value_error("dtype must be float32 or bfloat16, is " + name);
  return name == "float32" ? DType::f32 : DType::bf16;
}

using Pair = std::array<int64_t, 2>;

inline void require_positive(const Pair& values, const char* name) {
  if (values[0] < 1 || values[1] < 1) {
    throw py::value_error(std::string(name) + " must be positive, is " + describe(values.data(), 2));
  }
}

inline Conv2dGeometry conv2d_geometry(int64_t filter_h, int64_t filter_w, int64_t groups, const Pair& stride,
                                      const Pair& padding, const Pair& dilation) {
  require_positive(stride, "stride");
  require_positive(dilation, "dilation");
  return {filter_h, filter_w, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], groups};
}

// Bounds keep every product of two of these, and its sum with another, within 64 bits.
inline Pool2dGeometry pool2d_geometry(const Pair& kernel, const Pair& stride, const Pair& padding,
                                      const Pair& dilation) {
  require_positive(kernel, "kernel");
  require_positive(stride, "stride");
  require_positive(dilation, "dilation");
  constexpr int64_t limit = int64_t{1} << 30;
  for (int i = 0; i < 2; ++i) {
    if (kernel[i] > limit || stride[i] > limit || dilation[i] > limit || padding[i] < 0 || padding[i] > limit) {
      throw py::value_error("kernel, stride, padding and dilation must not be negative or exceed 2^30");
    }
  }
  return {kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

inline Activation activation_of(bool relu) {
  return relu ? Activation::relu : Activation::none;
}

// None, or a tensor of the output's shape and dtype.
inline TensorView residual_of(py::handle residual, const TensorView& out, Place place) {
  if (residual.is_none()) return {};
  const TensorView view = activation(residual, "residual", place, out.dtype);
  require_shape(view, "residual", out.n, out.c, out.h, out.w);
  return view;
}

// Reads the epilogue's tensors against the output they apply to.
inline Epilogue epilogue_of(const TensorView& out, Place place, py::handle scale, py::handle bias, py::handle residual,
                            bool relu) {
  return {python::vector(scale, "scale", place, out.c), python::vector(bias, "bias", place, out.c),
          residual_of(residual, out, place), activation_of(relu)};
}

inline Prologue prologue_of(const TensorView& input, Place place, py::handle scale, py::handle shift, bool relu) {
  return {python::vector(scale, "input_scale", place, input.c), python::vector(shift, "input_shift", place, input.c),
          relu};
}

}  // namespace fastcnn::python
