// The class `fastcnn._native.Plan`: steps are added with operands named by region and offset; what memory safety needs
// is checked here, once, because plans also come from files.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/conv2d_strassen.h"
#include "cpu/conv2d_winograd_plain.h"
#include "cpu/conv2d_winograd_rows.h"
#include "cpu/kernels.h"
#include "cpu/linear_short.h"
#include "cpu/plan.h"
#include "cpu/rows.h"
#include "cpu/strided.h"
#include "cpu/workspace.h"
#include "plan_call.h"
#include "python_tensor.h"

namespace py = pybind11;
using namespace fastcnn;          // NOLINT
using namespace fastcnn::python;  // NOLINT
using cpu::Operand;

namespace {

constexpr int kConstants = 1;  // the region of constants

class PyPlan {
 public:
  PyPlan(int64_t arena_bytes, py::object constants, const std::vector<int64_t>& input_bytes,
         const std::vector<int64_t>& output_bytes)
      : constants_(std::move(constants)) {
    const Imported memory(constants_, "constants", kDLCPU);
    memory.require_dimensions(1);
    if (memory.tensor.dtype.bits != 8 || (memory.size(0) > 1 && memory.stride(0) != 1)) {
      throw py::type_error("constants must be contiguous bytes");
    }
    for (const int64_t bytes : input_bytes) require_bytes(bytes);
    for (const int64_t bytes : output_bytes) require_bytes(bytes);
    require_bytes(arena_bytes);
    plan_ = std::make_unique<cpu::Plan>(arena_bytes, memory.data(), memory.size(0), input_bytes, output_bytes);
  }

  void conv2d(const py::tuple& out, const py::tuple& input, std::shared_ptr<cpu::PackedConv2dWeight> weight,
              const py::object& scale, const py::object& bias, const py::object& residual,
              const py::object& input_scale, const py::object& input_shift, bool input_relu, bool relu, Pair stride,
              Pair padding, Pair dilation, bool max_pool) {
    if (weight->bf16_pairs && operand(input, "input").dtype != DType::bf16) {
      throw py::type_error("input must be bfloat16, as the weight that was packed");
    }
    const Conv2dGeometry geometry =
        conv2d_geometry(weight->filter_h, weight->filter_w, weight->groups, stride, padding, dilation);
    if (max_pool) {
      const TensorView y = view(operand(out, "out"), "out"), x = view(operand(input, "input"), "input");
      require_shape(y, "out", x.n, weight->out_channels, y.h, y.w);
      require_shape(x, "input", y.n, weight->in_channels, x.h, x.w);
      if (!residual.is_none()) throw py::value_error("residual must be None where max_pool is set");
      if (geometry.pad_top < 0 || geometry.pad_left < 0) throw py::value_error("padding must not be negative");
      if (!cpu::conv2d_may_pool(y, x, *weight, geometry)) {
        throw py::value_error("max_pool must be set only where cpu_conv2d_may_pool says so");
      }
    }
    convolution(
        out, input, *weight, geometry, scale, bias, residual, input_scale, input_shift, input_relu, relu,
        [=](const TensorView& y, const TensorView& x, const Prologue& prologue, const Epilogue& epilogue, int threads) {
          return cpu::conv2d_work(y, x, *weight, prologue, epilogue, geometry, threads, max_pool);
        });
  }

  void conv2d_strassen(const py::tuple& out, const py::tuple& input, std::shared_ptr<cpu::PackedConv2dWeight> weight,
                       const py::object& scale, const py::object& bias, const py::object& residual,
                       const py::object& input_scale, const py::object& input_shift, bool input_relu, bool relu) {
    const Operand x = operand(input, "input"), y = operand(out, "out");
    if (const char* refusal = cpu::conv2d_strassen_refusal(*weight, x.dtype)) throw py::value_error(refusal);
    const TensorView xv = view(x, "input"), yv = view(y, "out");
    require_shape(yv, "out", xv.n, yv.c, xv.h, xv.w);
    convolution(out, input, *weight, conv2d_geometry(1, 1, 1, {1, 1}, {0, 0}, {1, 1}), scale, bias, residual,
                input_scale, input_shift, input_relu, relu,
                [=](const TensorView& y, const TensorView& x, const Prologue& prologue, const Epilogue& epilogue,
                    int threads) { return cpu::conv2d_strassen_work(y, x, *weight, prologue, epilogue, threads); });
  }

  void conv2d_winograd(const py::tuple& out, const py::tuple& input,
                       std::shared_ptr<cpu::PackedConv2dWinogradWeight> weight, const py::object& scale,
                       const py::object& bias, const py::object& residual, const py::object& input_scale,
                       const py::object& input_shift, bool input_relu, bool relu, Pair padding, bool max_pool) {
    if (max_pool && !residual.is_none()) throw py::value_error("residual must be None where max_pool is set");
    if (weight->bf16_pairs && operand(input, "input").dtype != DType::bf16) {
      throw py::type_error("input must be bfloat16, as the weight that was packed");
    }
    const Conv2dGeometry geometry =
        conv2d_geometry(weight->filter, weight->filter, 1, {weight->stride, weight->stride}, padding, {1, 1});
    convolution(
        out, input, *weight, geometry, scale, bias, residual, input_scale, input_shift, input_relu, relu,
        [=](const TensorView& y, const TensorView& x, const Prologue& prologue, const Epilogue& epilogue, int threads) {
          return cpu::conv2d_winograd_work(y, x, *weight, prologue, epilogue, geometry, threads, max_pool);
        });
  }

  void conv2d_winograd_plain(const py::tuple& out, const py::tuple& input,
                             std::shared_ptr<cpu::PlainWinogradWeight> weight, const py::object& scale,
                             const py::object& bias, const py::object& residual, const py::object& input_scale,
                             const py::object& input_shift, bool input_relu, bool relu, Pair padding, bool max_pool) {
    if (max_pool && !residual.is_none()) throw py::value_error("residual must be None where max_pool is set");
    const Conv2dGeometry geometry = conv2d_geometry(3, 3, weight->groups, {1, 1}, padding, {1, 1});
    convolution(
        out, input, *weight, geometry, scale, bias, residual, input_scale, input_shift, input_relu, relu,
        [=](const TensorView& y, const TensorView& x, const Prologue& prologue, const Epilogue& epilogue, int threads) {
          return cpu::conv2d_winograd_plain_work(y, x, *weight, prologue, epilogue, geometry, threads, max_pool);
        });
  }

  void conv2d_winograd_rows(const py::tuple& out, const py::tuple& input,
                            std::shared_ptr<cpu::RowWinogradWeight> weight, const py::object& scale,
                            const py::object& bias, const py::object& residual, const py::object& input_scale,
                            const py::object& input_shift, bool input_relu, bool relu, Pair padding, bool max_pool) {
    if (max_pool && weight->stride != 1) {
      throw py::value_error("max_pool must be False beside a weight along rows with a stride");
    }
    if (max_pool && !residual.is_none()) throw py::value_error("residual must be None where max_pool is set");
    const Conv2dGeometry geometry =
        conv2d_geometry(weight->filter, weight->filter, 1, {weight->stride, weight->stride}, padding, {1, 1});
    convolution(
        out, input, *weight, geometry, scale, bias, residual, input_scale, input_shift, input_relu, relu,
        [=](const TensorView& y, const TensorView& x, const Prologue& prologue, const Epilogue& epilogue, int threads) {
          return cpu::conv2d_winograd_rows_work(y, x, *weight, prologue, epilogue, geometry, threads, max_pool);
        });
  }

  void linear(const py::tuple& out, const py::tuple& input, const py::tuple& weight, const py::object& bias,
              bool relu) {
    const Operand y = operand(out, "out"), x = operand(input, "input"), w = operand(weight, "weight");
    const TensorView yv = matrix(y, "out"), xv = matrix(x, "input"), wv = matrix(w, "weight");
    require_shape(yv, "out", xv.n, wv.n, 1, 1);
    require_shape(wv, "weight", wv.n, xv.c, 1, 1);
    require_one_dtype({y, x, w});
    const Operand b = vector(bias, "bias", yv.c);
    const int64_t workspace_bytes = cpu::linear_workspace_bytes(xv.n, xv.c);
    shares_workspace_ |= workspace_bytes > 0;
    workspace_->reserve(workspace_bytes);  // here, so that its size is known before a run
    plan_->add({y, x, w}, [=, workspace = workspace_](const cpu::Plan::Bases& at, int threads) {
      return cpu::linear_work(placed(yv, y, at), placed(xv, x, at), placed(wv, w, at), floats(b, at),
                              activation_of(relu), threads, workspace);
    });
  }

  void linear_short(const py::tuple& out, const py::tuple& input, std::shared_ptr<cpu::ShortLinearWeight> weight,
                    const py::object& bias, bool relu) {
    const Operand y = operand(out, "out"), x = operand(input, "input");
    const TensorView yv = matrix(y, "out"), xv = matrix(x, "input");
    require_shape(yv, "out", xv.n, weight->columns, 1, 1);
    require_shape(xv, "input", yv.n, weight->depth, 1, 1);
    require_one_dtype({y, x});
    if (xv.dtype != weight->dtype) throw py::type_error("input must have the dtype of the weight that was packed");
    if (weight->layout == cpu::ShortLayout::by_input && xv.n != 1) {
      throw py::value_error("input must have one row where the weight was packed by input");
    }
    const Operand b = vector(bias, "bias", yv.c);
    plan_->add({y, x}, [=](const cpu::Plan::Bases& at, int threads) {
      return cpu::linear_short_work(placed(yv, y, at), placed(xv, x, at), *weight, floats(b, at), activation_of(relu),
                                    threads);
    });
  }

  void channel_affine(const py::tuple& out, const py::tuple& input, const py::object& scale, const py::object& shift,
                      const py::object& residual, bool relu, float factor) {
    const Operand y = operand(out, "out"), x = operand(input, "input");
    const TensorView yv = view(y, "out"), xv = view(x, "input");
    require_shape(xv, "input", yv.n, yv.c, yv.h, yv.w);
    require_one_dtype({y, x});
    const Operand s = vector(scale, "scale", yv.c), t = vector(shift, "shift", yv.c);
    const Operand r = residual_of(residual, yv);
    plan_->add({y, x, r}, [=](const cpu::Plan::Bases& at, int threads) {
      return cpu::channel_affine_work(view(y, at), view(x, at), floats(s, at), floats(t, at), nullptr, view(r, at),
                                      activation_of(relu), factor, threads);
    });
  }

  void max_pool2d(const py::tuple& out, const py::tuple& input, Pair kernel, Pair stride, Pair padding, Pair dilation) {
    const Pool2dGeometry geometry = pool2d_geometry(kernel, stride, padding, dilation);
    pool(out, input, [=](const TensorView& y, const TensorView& x, int threads) {
      return cpu::max_pool2d_work(y, x, geometry, threads);
    });
  }

  void avg_pool2d(const py::tuple& out, const py::tuple& input, Pair kernel, Pair stride, Pair padding,
                  bool count_include_pad, int64_t divisor) {
    const Pool2dGeometry geometry = pool2d_geometry(kernel, stride, padding, {1, 1});
    pool(out, input, [=](const TensorView& y, const TensorView& x, int threads) {
      return cpu::avg_pool2d_work(y, x, geometry, padding[0], padding[1], count_include_pad, divisor, threads);
    });
  }

  void adaptive_avg_pool2d(const py::tuple& out, const py::tuple& input) {
    pool(out, input, cpu::adaptive_avg_pool2d_work);
  }

  void local_response_norm(const py::tuple& out, const py::tuple& input, int64_t size, float alpha, float beta,
                           float k) {
    const TensorView y = view(operand(out, "out"), "out"), x = view(operand(input, "input"), "input");
    require_shape(y, "out", x.n, x.c, x.h, x.w);
    if (size < 1) throw py::value_error("size must be positive, is " + std::to_string(size));
    pool(out, input, [=](const TensorView& y, const TensorView& x, int threads) {
      return cpu::local_response_norm_work(y, x, size, alpha, beta, k, threads);
    });
  }

  void copy(const py::tuple& out, const py::tuple& input) {
    const Operand y = operand(out, "out"), x = operand(input, "input");
    require_same_shape(y, x);
    plan_->add({y, x}, [=](const cpu::Plan::Bases& at, int threads) {
      return cpu::copy_work(strided(y, at), strided(x, at), threads);
    });
  }

  void fill(const py::tuple& out, float value) {
    const Operand y = operand(out, "out");
    plan_->add({y},
               [=](const cpu::Plan::Bases& at, int threads) { return cpu::fill_work(strided(y, at), value, threads); });
  }

  void map(const py::tuple& out, const py::tuple& a, const py::object& b, const std::string& name, float alpha,
           float beta) {
    // In the order of cpu::Map.
    static const std::vector<std::string> names = {
        "add",         "subtract",  "multiply", "divide",     "maximum", "minimum", "negate",     "absolute",
        "square",      "sqrt",      "rsqrt",    "reciprocal", "exp",     "tanh",    "sigmoid",    "silu",
        "hardsigmoid", "hardswish", "gelu",     "gelu_tanh",  "mish",    "clamp",   "leaky_relu", "elu"};
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) throw py::value_error("map must be known, is " + name);
    const auto kind = static_cast<cpu::Map>(found - names.begin());
    const Operand y = operand(out, "out"), left = operand(a, "a");
    const Operand right = b.is_none() ? Operand{} : operand(b.cast<py::tuple>(), "b");
    const bool binary = kind < cpu::Map::negate;
    if (binary == b.is_none())
      throw py::value_error("map " + name + " must have " + (binary ? "two" : "one") + " input");
    require_same_shape(y, left);
    require_one_dtype({y, left});
    if (binary) require_same_shape(y, right), require_one_dtype({y, right});
    plan_->add({y, left, right}, [=](const cpu::Plan::Bases& at, int threads) {
      return cpu::map_work(kind, alpha, beta, strided(y, at), strided(left, at),
                           binary ? strided(right, at) : cpu::Strided{}, threads);
    });
  }

  void reduce_last(const py::tuple& out, const py::tuple& input, const std::string& name, float factor) {
    if (name != "sum" && name != "max") throw py::value_error("reduction must be sum or max, is " + name);
    const auto reduction = name == "sum" ? cpu::Reduction::sum : cpu::Reduction::max;
    const Operand y = operand(out, "out"), x = operand(input, "input");
    std::vector<int64_t> shape = x.shape;
    if (shape.empty()) throw py::value_error("input must have a dimension to reduce");
    shape.pop_back();
    if (shape != y.shape) throw py::value_error("out must have the input's shape but for its last dimension");
    require_one_dtype({y, x});
    plan_->add({y, x}, [=](const cpu::Plan::Bases& at, int threads) {
      return cpu::reduce_last_work(reduction, strided(y, at), strided(x, at), factor, threads);
    });
  }

  void layer_norm(const py::tuple& out, const py::tuple& input, const py::object& weight, const py::object& bias,
                  float eps) {
    const Operand y = operand(out, "out"), x = operand(input, "input");
    const TensorView yv = matrix(y, "out"), xv = matrix(x, "input");
    require_shape(yv, "out", xv.n, xv.c, 1, 1);
    require_one_dtype({y, x});
    const Operand w = vector(weight, "weight", xv.c), b = vector(bias, "bias", xv.c);
    plan_->add({y, x}, [=](const cpu::Plan::Bases& at, int threads) {
      return cpu::layer_norm_work(placed(yv, y, at), placed(xv, x, at), floats(w, at), floats(b, at), eps, threads);
    });
  }

  void softmax(const py::tuple& out, const py::tuple& input) {
    const Operand y = operand(out, "out"), x = operand(input, "input");
    const TensorView yv = matrix(y, "out"), xv = matrix(x, "input");
    require_shape(yv, "out", xv.n, xv.c, 1, 1);
    require_one_dtype({y, x});
    plan_->add({y, x}, [=](const cpu::Plan::Bases& at, int threads) {
      return cpu::softmax_work(placed(yv, y, at), placed(xv, x, at), threads);
    });
  }

  void set_lanes(int64_t lanes) {
    if (lanes > 1 && shares_workspace_) throw py::value_error("lanes must not hold linear layers with many rows");
    plan_->set_lanes(lanes);
  }

  void run(const std::vector<py::object>& inputs, const std::vector<py::object>& outputs, int threads) {
    const auto [in, out] = memories(inputs, outputs, threads);
    py::gil_scoped_release release;
    plan_->run(in.data(), out.data(), threads);
  }

  // What `call_plan` runs for a frozen model (plan_call.h). inputs, outputs: (shape, strides, dtype) of each tensor,
  // which must span its region; leaf: whether the model's result is its one output; global_hooks: dictionaries of the
  // hooks of all modules; torch: the module.
  static py::object caller(const py::object& self, const py::list& inputs, const py::list& outputs, bool leaf,
                           std::vector<py::dict> global_hooks, const py::object& torch) {
    auto& plan = *self.cast<PyPlan&>().plan_;
    if (inputs.size() != plan.input_count() || outputs.size() != plan.output_count()) {
      throw py::value_error("a plan must be given as many inputs and outputs as it has");
    }
    const auto described = [&](const py::tuple& tensor, const char* name, size_t region) {
      const auto shape = tensor[0].cast<std::vector<int64_t>>(), strides = tensor[1].cast<std::vector<int64_t>>();
      const py::object dtype = tensor[2];
      const bool single = dtype.is(py::object(torch.attr("float32")));
      if (!single && !dtype.is(py::object(torch.attr("bfloat16")))) {
        throw py::type_error(std::string(name) + " must be float32 or bfloat16");
      }
      if (shape.size() != strides.size())
        throw py::value_error(std::string(name) + " must have a stride for each size");
      int64_t last = 0;
      for (size_t i = 0; i < shape.size(); ++i) {
        constexpr int64_t limit = int64_t{1} << 40;
        if (shape[i] < 1 || strides[i] < 0 || shape[i] > limit || (strides[i] > 0 && shape[i] > limit / strides[i])) {
          throw py::value_error(std::string(name) + " must have positive sizes and strides, and at most 2^40 values");
        }
        last += (shape[i] - 1) * strides[i];
      }
      if ((last + 1) * (single ? 4 : 2) < plan.region_bytes(region)) {
        throw py::value_error(std::string(name) + " must fill its region");
      }
      return PlanCall::Input{shape, strides, static_cast<uint8_t>(single ? kDLFloat : kDLBfloat),
                             static_cast<uint8_t>(single ? 32 : 16)};
    };
    std::vector<PlanCall::Input> in;
    std::vector<PlanCall::Output> out;
    for (const py::handle tensor : inputs) in.push_back(described(tensor.cast<py::tuple>(), "input", 2 + in.size()));
    for (const py::handle handle : outputs) {
      const auto tensor = handle.cast<py::tuple>();
      described(tensor, "output", 2 + in.size() + out.size());
      out.push_back({tensor[0], tensor[1], tensor[2], py::object()});
    }
    return PlanCall::capsule(
        std::make_unique<PlanCall>(self, plan, std::move(in), std::move(out), leaf, std::move(global_hooks), torch));
  }

  // [([step, ...], seconds), ...]: see cpu/plan.h.
  py::list profile(const std::vector<py::object>& inputs, const std::vector<py::object>& outputs, int threads) {
    const auto [in, out] = memories(inputs, outputs, threads);
    std::vector<cpu::Plan::Timed> timed;
    {
      py::gil_scoped_release release;
      timed = plan_->profile(in.data(), out.data(), threads);
    }
    py::list result;
    for (const cpu::Plan::Timed& entry : timed) result.append(py::make_tuple(entry.steps, entry.seconds));
    return result;
  }

  void fill_arena(int value) {
    py::gil_scoped_release release;
    plan_->fill_arena(value);
  }
  int64_t arena_bytes() const { return plan_->arena_bytes(); }
  int64_t step_count() const { return plan_->step_count(); }
  int64_t phase_count() const { return plan_->phase_count(); }
  int64_t workspace_bytes() const { return workspace_->bytes(); }

 private:
  // Where the caller's tensors lie, checked.
  std::pair<std::vector<void*>, std::vector<void*>> memories(const std::vector<py::object>& inputs,
                                                             const std::vector<py::object>& outputs,
                                                             int threads) const {
    if (threads < 1) throw py::value_error("threads must be positive, is " + std::to_string(threads));
    if (inputs.size() != plan_->input_count() || outputs.size() != plan_->output_count()) {
      throw py::value_error("a plan must be given as many inputs and outputs as it has");
    }
    std::vector<void*> in, out;
    for (size_t i = 0; i < inputs.size(); ++i) in.push_back(memory(inputs[i], "input", 2 + i));
    for (size_t i = 0; i < outputs.size(); ++i) out.push_back(memory(outputs[i], "output", 2 + inputs.size() + i));
    return {in, out};
  }

  static void require_bytes(int64_t bytes) {
    if (bytes < 0 || bytes > (int64_t{1} << 40)) throw py::value_error("a region must have 0 to 2^40 bytes");
  }

  bool is_output(int region) const { return static_cast<size_t>(region) >= 2 + plan_->input_count(); }

  // (region, offset in bytes, dtype, shape, strides), checked to lie within its region.
  Operand operand(const py::tuple& t, const char* name) const {
    if (t.size() != 5) throw py::value_error(std::string(name) + " must be (region, offset, dtype, shape, strides)");
    Operand result;
    result.region = t[0].cast<int>();
    result.offset = t[1].cast<int64_t>();
    const auto dtype = t[2].cast<std::string>();
    if (dtype != "float32" && dtype != "bfloat16") {
      throw py::type_error(std::string(name) + " must be float32 or bfloat16");
    }
    result.dtype = dtype == "float32" ? DType::f32 : DType::bf16;
    result.shape = t[3].cast<std::vector<int64_t>>();
    result.strides = t[4].cast<std::vector<int64_t>>();
    plan_->check(result, name);
    const bool constant = result.region == kConstants, input = result.region > kConstants && !is_output(result.region);
    if (std::strcmp(name, "out") == 0 && (constant || input))
      throw py::value_error("out must not be a constant or input");
    return result;
  }

  // None, or a contiguous fp32 vector of constants. Without one, the operand has no sizes.
  Operand vector(const py::object& object, const char* name, int64_t length) const {
    if (object.is_none()) return {};
    const Operand v = operand(object.cast<py::tuple>(), name);
    const bool fits = v.region == kConstants && v.dtype == DType::f32 && v.shape == std::vector<int64_t>{length} &&
                      (length == 1 || v.strides[0] == 1);
    if (!fits) throw py::value_error(std::string(name) + " must be " + std::to_string(length) + " float32 constants");
    return v;
  }

  static const float* floats(const Operand& v, const cpu::Plan::Bases& at) {
    return v.shape.empty() ? nullptr : static_cast<const float*>(address(v, at));
  }

  static void* address(const Operand& o, const cpu::Plan::Bases& at) {
    return at[static_cast<size_t>(o.region)] + o.offset;
  }

  // The operand as channels-last pixels, without an address; the same rule as for a tensor (python_tensor.h).
  static TensorView view(const Operand& o, const char* name) {
    Operand copy = o;
    DLTensor tensor = {};
    tensor.ndim = static_cast<int32_t>(copy.shape.size());
    tensor.shape = copy.shape.data();
    tensor.strides = copy.strides.data();
    tensor.dtype = {static_cast<uint8_t>(o.dtype == DType::f32 ? kDLFloat : kDLBfloat),
                    static_cast<uint8_t>(o.dtype == DType::f32 ? 32 : 16), 1};
    return activation(Imported(tensor, name));
  }
  static TensorView placed(TensorView v, const Operand& o, const cpu::Plan::Bases& at) {
    v.data = address(o, at);
    return v;
  }
  static TensorView view(const Operand& o, const cpu::Plan::Bases& at) {
    return o.shape.empty() ? TensorView{} : placed(view(o, "operand"), o, at);
  }
  static TensorView matrix(const Operand& o, const char* name) {
    if (o.shape.size() != 2 || (o.shape[1] > 1 && o.strides[1] != 1) || (o.shape[0] > 1 && o.strides[0] < o.shape[1])) {
      throw py::value_error(std::string(name) + " must be a matrix with adjacent columns");
    }
    return {nullptr, o.dtype, o.shape[0], 1, 1, o.shape[1], o.shape[0] > 1 ? o.strides[0] : o.shape[1]};
  }
  static cpu::Strided strided(const Operand& o, const cpu::Plan::Bases& at) {
    return {address(o, at), o.dtype, o.shape, o.strides};
  }

  Operand residual_of(const py::object& object, const TensorView& out) const {
    if (object.is_none()) return {};
    const Operand r = operand(object.cast<py::tuple>(), "residual");
    const TensorView v = view(r, "residual");
    require_shape(v, "residual", out.n, out.c, out.h, out.w);
    if (v.dtype != out.dtype) throw py::type_error("residual must have the output's dtype");
    return r;
  }

  // Checks a convolution's operands and adds it; make(out, input, prologue, epilogue, threads) gives its works.
  template <typename Weight, typename Make>
  void convolution(const py::tuple& out, const py::tuple& input, const Weight& weight, const Conv2dGeometry& geometry,
                   const py::object& scale, const py::object& bias, const py::object& residual,
                   const py::object& input_scale, const py::object& input_shift, bool input_relu, bool relu,
                   Make make) {
    const Operand y = operand(out, "out"), x = operand(input, "input");
    const TensorView yv = view(y, "out"), xv = view(x, "input");
    require_shape(xv, "input", yv.n, weight.in_channels, xv.h, xv.w);
    require_shape(yv, "out", xv.n, weight.out_channels, yv.h, yv.w);
    require_one_dtype({y, x});
    if (geometry.pad_top < 0 || geometry.pad_left < 0) throw py::value_error("padding must not be negative");
    const Operand s = vector(scale, "scale", yv.c), b = vector(bias, "bias", yv.c),
                  is = vector(input_scale, "input_scale", xv.c), it = vector(input_shift, "input_shift", xv.c);
    const Operand r = residual_of(residual, yv);
    plan_->add({y, x, r}, [=](const cpu::Plan::Bases& at, int threads) {
      return make(view(y, at), view(x, at), {floats(is, at), floats(it, at), input_relu},
                  {floats(s, at), floats(b, at), view(r, at), activation_of(relu)}, threads);
    });
  }

  template <typename Prepare>
  void pool(const py::tuple& out, const py::tuple& input, Prepare prepare) {
    const Operand y = operand(out, "out"), x = operand(input, "input");
    const TensorView yv = view(y, "out"), xv = view(x, "input");
    require_shape(yv, "out", xv.n, xv.c, yv.h, yv.w);
    require_one_dtype({y, x});
    plan_->add({y, x},
               [=](const cpu::Plan::Bases& at, int threads) { return prepare(view(y, at), view(x, at), threads); });
  }

  static void require_same_shape(const Operand& a, const Operand& b) {
    if (a.shape != b.shape) throw py::value_error("operands must have one shape");
  }
  static void require_one_dtype(const std::vector<Operand>& operands) {
    for (const Operand& o : operands) {
      if (o.dtype != operands.front().dtype) throw py::type_error("operands must have one dtype");
    }
  }

  void* memory(const py::object& object, const char* name, size_t region) const {
    const Imported t(object, name, kDLCPU);
    int64_t last = 0;
    for (int i = 0; i < t.tensor.ndim; ++i) last += (t.size(i) - 1) * t.stride(i);
    if ((last + 1) * t.tensor.dtype.bits / 8 < plan_->region_bytes(region)) {
      throw py::value_error(std::string(name) + " must have " + std::to_string(plan_->region_bytes(region)) + " bytes");
    }
    return t.data();
  }

  py::object constants_;
  std::unique_ptr<cpu::Plan> plan_;
  // Of all steps with several works: the plan runs those of one step at a time.
  std::shared_ptr<cpu::Workspace> workspace_ = std::make_shared<cpu::Workspace>();
  bool shares_workspace_ = false;
};

void require_short_weights(DType dtype) {
  if (!cpu::reads_short_weights(dtype)) {
    throw py::value_error("dtype must be one whose short weights this processor's instruction set reads");
  }
}

// Whether Plan.conv2d may pool: `out` is what would be left, with pixels `pixel_stride` apart.
bool conv2d_may_pool(const cpu::PackedConv2dWeight& weight, const std::vector<int64_t>& out, int64_t pixel_stride,
                     const std::vector<int64_t>& input, const std::string& dtype, Pair stride, Pair padding,
                     Pair dilation) {
  if (out.size() != 4 || input.size() != 4) throw py::value_error("out and input must have 4 sizes");
  const DType type = dtype_named(dtype);
  const TensorView y = {nullptr, type, out[0], out[2], out[3], out[1], pixel_stride};
  const TensorView x = {nullptr, type, input[0], input[2], input[3], input[1], input[1]};
  return cpu::conv2d_may_pool(
      y, x, weight, conv2d_geometry(weight.filter_h, weight.filter_w, weight.groups, stride, padding, dilation));
}

cpu::ShortLayout short_layout(bool by_input) {
  return by_input ? cpu::ShortLayout::by_input : cpu::ShortLayout::by_output;
}

std::shared_ptr<cpu::ShortLinearWeight> short_linear_weight(py::handle weight, bool by_input) {
  const TensorView view = matrix(weight, "weight", kDLCPU);
  require_short_weights(view.dtype);
  if (view.n < 1 || view.c < 1) throw py::value_error("weight must not be empty");
  py::gil_scoped_release release;
  return std::make_shared<cpu::ShortLinearWeight>(view, short_layout(by_input));
}

std::shared_ptr<cpu::ShortLinearWeight> short_linear_weight_from(const py::buffer& packed, int64_t columns,
                                                                 int64_t depth, const std::string& dtype,
                                                                 bool by_input) {
  const py::buffer_info info = packed.request();
  const int64_t bytes = info.size * info.itemsize;
  const DType type = dtype_named(dtype);
  require_short_weights(type);
  // A bound that keeps the sizes' product within 64 bits.
  if (columns < 1 || depth < 1 || columns > bytes || depth > bytes) {
    throw py::value_error("packed must hold the weight's values");
  }
  return std::make_shared<cpu::ShortLinearWeight>(type, columns, depth, short_layout(by_input), info.ptr, bytes);
}

}  // namespace

void bind_plan(py::module_& m) {
  m.attr("call_plan") = PlanCall::function();
  m.def("cpu_reads_short_weights",
        [](const std::string& dtype) { return cpu::reads_short_weights(dtype_named(dtype)); });
  m.def("cpu_conv2d_may_pool", &conv2d_may_pool, py::arg("weight"), py::arg("out"), py::arg("pixel_stride"),
        py::arg("input"), py::arg("dtype"), py::arg("stride"), py::arg("padding"), py::arg("dilation"));
  py::class_<cpu::ShortLinearWeight, std::shared_ptr<cpu::ShortLinearWeight>>(m, "ShortLinearWeight")
      .def(py::init(&short_linear_weight), py::arg("weight"), py::arg("by_input") = false)
      .def_static("from_packed", &short_linear_weight_from, py::arg("packed"), py::arg("columns"), py::arg("depth"),
                  py::arg("dtype"), py::arg("by_input") = false)
      .def("packed", [](const cpu::ShortLinearWeight& weight) { return py::bytes(weight.data(), weight.bytes()); })
      .def_property_readonly("bytes", &cpu::ShortLinearWeight::bytes);
  py::class_<PyPlan>(m, "Plan")
      .def(py::init<int64_t, py::object, std::vector<int64_t>, std::vector<int64_t>>(), py::arg("arena_bytes"),
           py::arg("constants"), py::arg("input_bytes"), py::arg("output_bytes"))
      .def("conv2d", &PyPlan::conv2d, py::arg("out"), py::arg("input"), py::arg("weight"), py::arg("scale"),
           py::arg("bias"), py::arg("residual"), py::arg("input_scale"), py::arg("input_shift"), py::arg("input_relu"),
           py::arg("relu"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("max_pool") = false)
      .def("conv2d_strassen", &PyPlan::conv2d_strassen, py::arg("out"), py::arg("input"), py::arg("weight"),
           py::arg("scale"), py::arg("bias"), py::arg("residual"), py::arg("input_scale"), py::arg("input_shift"),
           py::arg("input_relu"), py::arg("relu"))
      .def("conv2d_winograd", &PyPlan::conv2d_winograd, py::arg("out"), py::arg("input"), py::arg("weight"),
           py::arg("scale"), py::arg("bias"), py::arg("residual"), py::arg("input_scale"), py::arg("input_shift"),
           py::arg("input_relu"), py::arg("relu"), py::arg("padding"), py::arg("max_pool") = false)
      .def("conv2d_winograd", &PyPlan::conv2d_winograd_plain, py::arg("out"), py::arg("input"), py::arg("weight"),
           py::arg("scale"), py::arg("bias"), py::arg("residual"), py::arg("input_scale"), py::arg("input_shift"),
           py::arg("input_relu"), py::arg("relu"), py::arg("padding"), py::arg("max_pool") = false)
      .def("conv2d_winograd", &PyPlan::conv2d_winograd_rows, py::arg("out"), py::arg("input"), py::arg("weight"),
           py::arg("scale"), py::arg("bias"), py::arg("residual"), py::arg("input_scale"), py::arg("input_shift"),
           py::arg("input_relu"), py::arg("relu"), py::arg("padding"), py::arg("max_pool") = false)
      .def("linear", &PyPlan::linear)
      .def("linear_short", &PyPlan::linear_short)
      .def("channel_affine", &PyPlan::channel_affine)
      .def("max_pool2d", &PyPlan::max_pool2d)
      .def("avg_pool2d", &PyPlan::avg_pool2d)
      .def("adaptive_avg_pool2d", &PyPlan::adaptive_avg_pool2d)
      .def("local_response_norm", &PyPlan::local_response_norm)
      .def("copy", &PyPlan::copy)
      .def("fill", &PyPlan::fill)
      .def("map", &PyPlan::map)
      .def("reduce_last", &PyPlan::reduce_last)
      .def("layer_norm", &PyPlan::layer_norm)
      .def("softmax", &PyPlan::softmax)
      .def("set_lanes", &PyPlan::set_lanes)
      .def("run", &PyPlan::run)
      .def("caller", &PyPlan::caller)
      .def("profile", &PyPlan::profile)
      .def("fill_arena", &PyPlan::fill_arena)
      .def_property_readonly("arena_bytes", &PyPlan::arena_bytes)
      .def_property_readonly("step_count", &PyPlan::step_count)
      .def_property_readonly("phase_count", &PyPlan::phase_count)
      .def_property_readonly("workspace_bytes", &PyPlan::workspace_bytes);
}
