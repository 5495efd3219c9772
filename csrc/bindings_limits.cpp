// The loops that reach the machine's limits (cpu/machine_limits.h) for fastcnn/measurement/limits.py.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "cpu/machine_limits.h"
#include "python_tensor.h"

namespace py = pybind11;
using namespace fastcnn;          // NOLINT
using namespace fastcnn::python;  // NOLINT

namespace {

void require_positive(int64_t value, const char* name) {
  if (value < 1) throw py::value_error(std::string(name) + " must be positive, is " + std::to_string(value));
}

template <cpu::LoopResult (*Limit)(int64_t, int)>
std::pair<double, double> in_registers(int64_t iterations, int threads) {
  require_positive(iterations, "iterations");
  require_positive(threads, "threads");
  py::gil_scoped_release release;
  const cpu::LoopResult result = Limit(iterations, threads);
  return {result.operations, result.mean};
}

// A contiguous, one-dimensional fp32 tensor of the CPU.
Imported contiguous_floats(py::handle object, const char* name) {
  Imported t(object, name, kDLCPU);
  t.require_dimensions(1);
  if (t.dtype() != DType::f32 || (t.size(0) > 1 && t.stride(0) != 1)) {
    throw py::type_error(std::string(name) + " must be contiguous float32");
  }
  return t;
}

double read_limit(py::handle input, int threads) {
  const Imported t = contiguous_floats(input, "input");
  require_positive(threads, "threads");
  py::gil_scoped_release release;
  return cpu::read_limit(static_cast<const float*>(t.data()), t.size(0), threads);
}

void copy_limit(py::handle out, py::handle input, int threads) {
  const Imported to = contiguous_floats(out, "out"), from = contiguous_floats(input, "input");
  require_positive(threads, "threads");
  if (to.size(0) != from.size(0)) throw py::value_error("out must be as long as input");
  const auto *a = static_cast<const char*>(to.data()), *b = static_cast<const char*>(from.data());
  const int64_t bytes = 4 * from.size(0);
  if (a < b + bytes && b < a + bytes) throw py::value_error("out must not overlap input");
  py::gil_scoped_release release;
  cpu::copy_limit(to.data(), from.data(), bytes, threads);
}

}  // namespace

void bind_limits(py::module_& m) {
  m.def("cpu_fma_limit", &in_registers<cpu::fma_limit>, py::arg("iterations"), py::arg("threads"));
  m.def("cpu_bf16_dot_limit", &in_registers<cpu::bf16_dot_limit>, py::arg("iterations"), py::arg("threads"));
  m.def("cpu_read_limit", &read_limit, py::arg("input"), py::arg("threads"));
  m.def("cpu_copy_limit", &copy_limit, py::arg("out"), py::arg("input"), py::arg("threads"));
}
