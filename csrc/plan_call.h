// A frozen model's call as one builtin function: checks the inputs, allocates the results and runs the plan.
//
// A small network runs in some microseconds, so what Python would do around it counts. The function serves inputs that
// lie exactly as the example did and returns None for all others, which Python then converts or names in an error. It
// looks for hooks as well, since looking from Python takes half a microsecond: with any, it returns None.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "cpu/plan.h"
#include "python_tensor.h"

namespace fastcnn::python {

class PlanCall {
 public:
  struct Input {
    std::vector<int64_t> shape, strides;
    uint8_t code, bits;
  };
  struct Output {
    py::object size, stride, dtype;
  };

  // `owner` keeps the plan alive; global_hooks: dictionaries, which must be empty; tensor: the class torch.Tensor;
  // empty_strided and get_num_threads: torch's.
  PlanCall(py::object owner, cpu::Plan& plan, std::vector<Input> inputs, std::vector<Output> outputs,
           std::vector<py::dict> global_hooks, py::object tensor, py::object empty_strided, py::object get_num_threads)
      : owner_(std::move(owner)),
        plan_(plan),
        inputs_(std::move(inputs)),
        outputs_(std::move(outputs)),
        global_hooks_(std::move(global_hooks)),
        tensor_(std::move(tensor)),
        empty_strided_(std::move(empty_strided)),
        get_num_threads_(std::move(get_num_threads)),
        is_neg_(py::str("is_neg")),
        keywords_(py::make_tuple("dtype")) {
    for (const char* name : {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}) {
      own_hooks_.push_back(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name)));
    }
  }

  // The function: the module's __dict__, then one positional argument an input; returns a tensor, a list where there
  // are several, or None.
  static py::object function(std::unique_ptr<PlanCall> call) {
    static PyMethodDef definition = {"plan_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&called)),
                                     METH_FASTCALL,
                                     "Run the plan, or None where an input lies otherwise or there are hooks."};
    py::capsule self(call.release(), [](void* pointer) { delete static_cast<PlanCall*>(pointer); });
    PyObject* function = PyCFunction_NewEx(&definition, self.ptr(), nullptr);
    if (function == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(function);
  }

 private:
  static PyObject* called(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    try {
      auto* call = static_cast<PlanCall*>(PyCapsule_GetPointer(self, nullptr));
      if (call == nullptr) return nullptr;
      if (count == 0 || call->hooked(arguments[0])) return py::none().release().ptr();
      return call->run(arguments + 1, count - 1).release().ptr();
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  py::object run(PyObject* const* arguments, Py_ssize_t count) const {
    if (static_cast<size_t>(count) != inputs_.size()) return py::none();
    std::vector<void*> addresses(inputs_.size() + outputs_.size());
    for (size_t i = 0; i < inputs_.size(); ++i) {
      addresses[i] = address(arguments[i], inputs_[i]);
      if (addresses[i] == nullptr) return py::none();
    }
    py::list results(outputs_.size() == 1 ? 0 : outputs_.size());
    py::object result;
    for (size_t i = 0; i < outputs_.size(); ++i) {
      PyObject* of[] = {outputs_[i].size.ptr(), outputs_[i].stride.ptr(), outputs_[i].dtype.ptr()};
      result = owned(PyObject_Vectorcall(empty_strided_.ptr(), of, 2, keywords_.ptr()));
      addresses[inputs_.size() + i] = Imported(result, "output", kDLCPU).data();
      if (outputs_.size() > 1) results[i] = result;
    }
    const int threads = owned(PyObject_CallNoArgs(get_num_threads_.ptr())).cast<int>();
    {
      py::gil_scoped_release release;
      plan_.run(addresses.data(), addresses.data() + inputs_.size(), threads);
    }
    return outputs_.size() == 1 ? result : results;
  }

  // Whether a module with these attributes has hooks, or all modules have; true as well where one cannot tell.
  bool hooked(PyObject* attributes) const {
    if (!PyDict_CheckExact(attributes)) return true;
    for (const py::object& name : own_hooks_) {
      PyObject* hooks = PyDict_GetItemWithError(attributes, name.ptr());
      if (hooks == nullptr && PyErr_Occurred()) throw py::error_already_set();
      if (hooks == nullptr || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) > 0) return true;
    }
    for (const py::dict& hooks : global_hooks_) {
      if (PyDict_GET_SIZE(hooks.ptr()) > 0) return true;
    }
    return false;
  }

  // Where a tensor lies, or null where it is not exactly as the example was. Strides of size-1 dimensions mean nothing.
  void* address(PyObject* object, const Input& expected) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != tensor_.ptr()) return nullptr;
    DLTensor t;
    if (exchange_api_of(object, "input")->dltensor_from_py_object_no_sync(object, &t) != 0) {
      PyErr_Clear();
      return nullptr;
    }
    if (t.device.device_type != kDLCPU || t.data == nullptr || t.dtype.code != expected.code ||
        t.dtype.bits != expected.bits || t.dtype.lanes != 1 || static_cast<size_t>(t.ndim) != expected.shape.size()) {
      return nullptr;
    }
    for (size_t i = 0; i < expected.shape.size(); ++i) {
      if (t.shape[i] != expected.shape[i] || (t.shape[i] > 1 && t.strides[i] != expected.strides[i])) return nullptr;
    }
    // A view that stands for its memory's negative.
    const py::object negative = owned(PyObject_CallMethodNoArgs(object, is_neg_.ptr()));
    return negative.ptr() == Py_False ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
  }

  static py::object owned(PyObject* object) {
    if (object == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
  }

  py::object owner_;
  cpu::Plan& plan_;
  std::vector<Input> inputs_;
  std::vector<Output> outputs_;
  std::vector<py::dict> global_hooks_;
  std::vector<py::object> own_hooks_;  // names of attributes
  py::object tensor_, empty_strided_, get_num_threads_, is_neg_, keywords_;
};

}  // namespace fastcnn::python
