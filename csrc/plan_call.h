// A frozen model's call as one builtin function: checks the inputs, allocates the results and runs the plan.
//
// A small network runs in some microseconds, so what Python would do around it counts. The function serves inputs that
// lie exactly as the example did and returns None for all others, which Python then converts or names in an error. It
// looks for hooks as well: with any, it returns None. It reads the module's attributes from its dictionary: a module
// looks each of them up in Python's slowest way, since nn.Module defines __getattr__.
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
    py::object like;  // a tensor without memory whose empty_like() is such a result, or null
  };

  // `owner` keeps the plan alive; leaf: the result is the one output, not a list; global_hooks: dictionaries, which
  // must be empty; torch: the module.
  PlanCall(py::object owner, cpu::Plan& plan, std::vector<Input> inputs, std::vector<Output> outputs, bool leaf,
           std::vector<py::dict> global_hooks, const py::object& torch)
      : owner_(std::move(owner)),
        plan_(plan),
        inputs_(std::move(inputs)),
        outputs_(std::move(outputs)),
        leaf_(leaf),
        global_hooks_(std::move(global_hooks)),
        tensor_(torch.attr("Tensor")),
        empty_like_(torch.attr("empty_like")),
        empty_strided_(torch.attr("empty_strided")),
        get_num_threads_(torch.attr("get_num_threads")),
        is_neg_(tensor_.attr("is_neg")),
        cpu_(torch.attr("device")("cpu")),
        keywords_(py::make_tuple("dtype", "device")) {
    if (leaf && outputs_.size() != 1) throw py::value_error("leaf must be set for a single output only");
    for (Output& output : outputs_) find_like(output);
    for (const char* name : {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}) {
      own_hooks_.push_back(interned(name));
    }
  }

  // What a module keeps under "_call".
  static py::object capsule(std::unique_ptr<PlanCall> call) {
    return py::capsule(call.release(), kName,
                       [](PyObject* capsule) { delete static_cast<PlanCall*>(PyCapsule_GetPointer(capsule, kName)); });
  }

  // The function: a module, a tuple of its positional arguments, a dictionary of the others; gives a tensor, a list
  // where the model's result is something else than a tensor, or None.
  static py::object function() {
    static PyMethodDef definition = {"call_plan", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&called)),
                                     METH_FASTCALL,
                                     "Run a module's plan, or None where an input lies otherwise or there are hooks."};
    return owned(PyCFunction_NewEx(&definition, nullptr, nullptr));
  }

 private:
  static constexpr const char* kName = "fastcnn.plan_call";

  static PyObject* called(PyObject* /*self*/, PyObject* const* arguments, Py_ssize_t count) {
    try {
      if (count != 3 || !PyTuple_Check(arguments[1]) || !PyDict_Check(arguments[2])) {
        throw py::type_error("call_plan takes a module, a tuple and a dictionary");
      }
      return of_module(arguments[0], arguments[1], arguments[2]).release().ptr();
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (py::builtin_exception& error) {
      error.set_error();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  static py::object of_module(PyObject* module, PyObject* arguments, PyObject* keywords) {
    static PyObject* const call_name = interned("_call").release().ptr();
    static PyObject* const compiled_name = interned("_compiled_call_impl").release().ptr();
    if (PyDict_GET_SIZE(keywords) > 0) return py::none();
    const py::object attributes = owned(PyObject_GenericGetDict(module, nullptr));
    PyObject* capsule = item(attributes.ptr(), call_name);
    PyObject* compiled = item(attributes.ptr(), compiled_name);  // what nn.Module.compile() sets
    if (capsule == nullptr || capsule == Py_None || (compiled != nullptr && compiled != Py_None)) return py::none();
    auto* call = static_cast<PlanCall*>(PyCapsule_GetPointer(capsule, kName));
    if (call == nullptr) throw py::error_already_set();
    if (call->hooked(attributes.ptr())) return py::none();
    const py::object alive = py::reinterpret_borrow<py::object>(capsule);  // whatever the arguments' own code does
    return call->run(arguments);
  }

  py::object run(PyObject* arguments) const {
    if (static_cast<size_t>(PyTuple_GET_SIZE(arguments)) != inputs_.size()) return py::none();
    constexpr size_t kFew = 8;
    void* few[kFew];
    std::vector<void*> many(inputs_.size() + outputs_.size() > kFew ? inputs_.size() + outputs_.size() : 0);
    void** in = many.empty() ? few : many.data();
    void** out = in + inputs_.size();
    for (size_t i = 0; i < inputs_.size(); ++i) {
      in[i] = address(PyTuple_GET_ITEM(arguments, static_cast<Py_ssize_t>(i)), inputs_[i]);
      if (in[i] == nullptr) return py::none();
    }
    py::object results;
    if (!leaf_) results = owned(PyList_New(static_cast<Py_ssize_t>(outputs_.size())));
    for (size_t i = 0; i < outputs_.size(); ++i) {
      py::object result = allocated(outputs_[i]);
      out[i] = Imported(result, "output", kDLCPU).data();
      if (leaf_) {
        results = std::move(result);
      } else {
        PyList_SET_ITEM(results.ptr(), static_cast<Py_ssize_t>(i), result.release().ptr());
      }
    }
    const int threads = owned(PyObject_CallNoArgs(get_num_threads_.ptr())).cast<int>();
    {
      py::gil_scoped_release release;
      plan_.run(in, out, threads);
    }
    return results;
  }

  py::object allocated(const Output& output) const {
    if (output.like) return owned(PyObject_CallOneArg(empty_like_.ptr(), output.like.ptr()));
    PyObject* of[] = {output.size.ptr(), output.stride.ptr(), output.dtype.ptr(), cpu_.ptr()};
    return owned(PyObject_Vectorcall(empty_strided_.ptr(), of, 2, keywords_.ptr()));
  }

  // empty_like() takes a tenth of a microsecond less than empty_strided(), and gives the same where memory has no gaps.
  void find_like(Output& output) const {
    py::object like = allocated(output);
    like.attr("untyped_storage")().attr("resize_")(0);
    const py::object made = empty_like_(like);
    if (py::tuple(made.attr("stride")()).equal(output.stride)) output.like = like;
  }

  // Whether a module with these attributes has hooks, or all modules have; true as well where one cannot tell.
  bool hooked(PyObject* attributes) const {
    for (const py::object& name : own_hooks_) {
      PyObject* hooks = item(attributes, name.ptr());
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
    const py::object negative = owned(PyObject_CallOneArg(is_neg_.ptr(), object));
    return negative.ptr() == Py_False ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
  }

  // Borrowed; null where there is none.
  static PyObject* item(PyObject* dictionary, PyObject* name) {
    PyObject* found = PyDict_GetItemWithError(dictionary, name);
    if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return found;
  }

  static py::object interned(const char* name) { return owned(PyUnicode_InternFromString(name)); }

  static py::object owned(PyObject* object) {
    if (object == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
  }

  py::object owner_;
  cpu::Plan& plan_;
  std::vector<Input> inputs_;
  std::vector<Output> outputs_;
  bool leaf_;
  std::vector<py::dict> global_hooks_;
  std::vector<py::object> own_hooks_;  // names of attributes
  py::object tensor_, empty_like_, empty_strided_, get_num_threads_, is_neg_, cpu_, keywords_;
};

}  // namespace fastcnn::python
