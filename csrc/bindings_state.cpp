// What Python asks about tensors on every operator call, in one native call for all of them: whether the arguments are
// of a form seen before (`signature`), whether tensors are still what they were (`tensor_states`), and whether writing
// one could change others (`may_overlap`).
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "python_tensor.h"

namespace py = pybind11;
using namespace fastcnn;          // NOLINT
using namespace fastcnn::python;  // NOLINT

namespace {

template <typename T>
void append(std::string& to, const T& value) {
  to.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

void describe(py::handle object, DLTensor* tensor) {
  if (exchange_api_of(object, "tensor")->dltensor_from_py_object_no_sync(object.ptr(), tensor) != 0) {
    throw py::error_already_set();
  }
}

void append_form(std::string& to, const DLTensor& t) {
  append(to, t.device);
  append(to, t.dtype);
  append(to, t.ndim);
  to.append(reinterpret_cast<const char*>(t.shape), static_cast<size_t>(t.ndim) * sizeof(int64_t));
  to.append(reinterpret_cast<const char*>(t.strides), static_cast<size_t>(t.ndim) * sizeof(int64_t));
}

// ---- forms of arguments -------------------------------------------------------------------------------------------

// Appends one argument; false for a kind that has no place in a signature.
bool append_argument(std::string& to, PyObject* object) {
  if (object == Py_None) {
    to += 'n';
  } else if (PyBool_Check(object)) {
    to += object == Py_True ? 't' : 'f';
  } else if (PyLong_CheckExact(object)) {
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow != 0) return false;
    to += 'i';
    append(to, value);
  } else if (PyFloat_CheckExact(object)) {
    to += 'd';
    append(to, PyFloat_AS_DOUBLE(object));
  } else if (PyUnicode_CheckExact(object)) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(object, &size);
    if (text == nullptr) throw py::error_already_set();
    to += 's';
    append(to, size);
    to.append(text, static_cast<size_t>(size));
  } else if (PyTuple_CheckExact(object)) {
    to += '(';
    append(to, PyTuple_GET_SIZE(object));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); ++i) {
      if (!append_argument(to, PyTuple_GET_ITEM(object, i))) return false;
    }
  } else {
    DLTensor tensor;
    try {
      describe(object, &tensor);
    } catch (const py::type_error&) {  // no tensor
      return false;
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
    to += address % 16 == 0 ? 'T' : 'U';
    append_form(to, tensor);
  }
  return true;
}

// All that checking an operator's arguments and choosing its kernel may look at: of tensors shapes, strides, dtypes,
// devices and whether vectors of 16 bytes are aligned, of the others their values. None for arguments that have no such
// description.
py::object signature(const py::tuple& arguments) {
  std::string text;
  text.reserve(1024);
  for (const py::handle argument : arguments) {
    if (!append_argument(text, argument.ptr())) return py::none();
  }
  return py::bytes(text);
}

// ---- states of tensors --------------------------------------------------------------------------------------------

constexpr int64_t kSmall = 4096, kSpread = 64;
constexpr int64_t kFetched = 32 << 10;  // bytes of one tensor; beyond, the processor foresees the addresses itself

// Visits the values that stand for a CPU tensor's, as (address, bytes): all values of a small tensor, and of any when
// `complete`; of a large one 64 spread evenly, and a diagonal that meets every index of every dimension (a filter or an
// input channel set to zero).
template <typename Visit>
void visit_values(const DLTensor& t, bool complete, Visit visit) {
  const int64_t item = t.dtype.bits * t.dtype.lanes / 8;
  int64_t count = 1, extent = 1, longest = 1;
  for (int i = 0; i < t.ndim; ++i) {
    count *= t.shape[i];
    extent += (t.shape[i] - 1) * t.strides[i];
    longest = std::max(longest, t.shape[i]);
  }
  if (count == 0 || t.data == nullptr) return;
  const char* data = static_cast<const char*>(t.data) + t.byte_offset;
  const bool whole = complete || count <= kSmall;
  if (whole && extent == count) {
    visit(data, count * item);
    return;
  }
  const int64_t samples = whole ? count : kSpread;
  for (int64_t sample = 0; sample < samples; ++sample) {
    int64_t index = whole ? sample : sample * (count - 1) / (samples - 1), offset = index;
    if (extent != count) {
      offset = 0;
      for (int i = t.ndim - 1; i >= 0; --i) {
        offset += index % t.shape[i] * t.strides[i];
        index /= t.shape[i];
      }
    }
    visit(data + offset * item, item);
  }
  if (whole) return;
  int64_t index[64] = {}, offset = 0;  // PyTorch's tensors have at most 64 dimensions
  for (int64_t sample = 0; sample < longest; ++sample) {
    visit(data + offset * item, item);
    for (int i = 0; i < t.ndim; ++i) {
      offset += t.strides[i];
      if (++index[i] == t.shape[i]) {
        index[i] = 0;
        offset -= t.shape[i] * t.strides[i];
      }
    }
  }
}

uint64_t hashed(uint64_t hash, uint64_t value) {
  return (hash ^ value) * 1099511628211u;
}

// A sum over bytes in their order; four side by side, so that one multiplication does not wait for the other.
struct Hash {
  uint64_t lanes[4] = {14695981039346656037u, 1, 2, 3};

  void add(const char* data, int64_t bytes) {
    uint64_t words[4];
    for (; bytes >= 32; data += 32, bytes -= 32) {
      std::memcpy(words, data, 32);
      for (int i = 0; i < 4; ++i) lanes[i] = hashed(lanes[i], words[i]);
    }
    for (int lane = 0; bytes > 0; data += 8, bytes -= 8, lane = (lane + 1) % 4) {
      lanes[lane] = hashed(lanes[lane], first_word(data, bytes));
    }
  }
  static uint64_t first_word(const char* data, int64_t bytes) {
    uint64_t word = 0;
    uint32_t half;
    if (bytes == 4) {  // an fp32 value
      std::memcpy(&half, data, 4);
      return half;
    }
    std::memcpy(&word, data, static_cast<size_t>(std::min<int64_t>(bytes, 8)));
    return word;
  }
  uint64_t value() const { return hashed(hashed(hashed(lanes[0], lanes[1] >> 7), lanes[2] >> 13), lanes[3] >> 21); }
};

// Form and address of each tensor (or None), and on the CPU a hash of its values. It notices what was written behind
// autograd's back. Values in memory are asked for all at once before the first is read: by then most weights have left
// the caches, and waiting for one value after the other would take longer than many a kernel.
py::bytes tensor_states(const py::tuple& tensors, bool complete) {
  std::string text;
  text.reserve(1024);
  DLTensor t;
  for (const py::handle tensor : tensors) {
    if (tensor.is_none()) continue;
    describe(tensor, &t);
    if (t.device.device_type != kDLCPU) continue;
    visit_values(t, complete, [](const char* at, int64_t bytes) {
      for (int64_t line = 0; line < std::min(bytes, kFetched); line += 64) __builtin_prefetch(at + line);
    });
  }
  for (const py::handle tensor : tensors) {
    if (tensor.is_none()) {
      text += 'n';
      continue;
    }
    describe(tensor, &t);
    text += 'T';
    append_form(text, t);
    append(text, static_cast<char*>(t.data) + t.byte_offset);
    if (t.device.device_type != kDLCPU) continue;
    Hash hash;
    visit_values(t, complete, [&](const char* at, int64_t bytes) { hash.add(at, bytes); });
    append(text, hash.value());
  }
  return py::bytes(text);
}

// ---- overlap --------------------------------------------------------------------------------------------------------

struct Extent {
  const char *begin, *end;  // of the memory that a tensor lies in
  int64_t ring, channels;   // bytes from a pixel to the next, and of its channels; 0 for what is no picture of pixels

  explicit Extent(const DLTensor& t) {
    const int64_t item = t.dtype.bits * t.dtype.lanes / 8;
    begin = end = static_cast<const char*>(t.data) + t.byte_offset;
    ring = channels = 0;
    int64_t last = 0;
    for (int i = 0; i < t.ndim; ++i) {
      if (t.shape[i] == 0) return;
      last += (t.shape[i] - 1) * t.strides[i];
    }
    end += (last + 1) * item;
    if (t.ndim != 4) return;
    const int64_t n = t.shape[0], c = t.shape[1], h = t.shape[2], w = t.shape[3];
    const int64_t pixel = w > 1 ? t.strides[3] : h > 1 ? t.strides[2] : n > 1 ? t.strides[0] : c;
    const bool fits = (c == 1 || t.strides[1] == 1) && pixel >= c && (h == 1 || t.strides[2] == w * pixel) &&
                      (n == 1 || t.strides[0] == h * w * pixel);
    if (fits) ring = pixel * item, channels = c * item;
  }

  bool meets(const Extent& other) const {
    if (end <= other.begin || other.end <= begin) return false;
    if (ring == 0 || ring != other.ring) return true;
    // Both repeat every pixel: compare their channels on a ring of that length.
    const int64_t distance = ((other.begin - begin) % ring + ring) % ring;
    return distance < channels || distance + other.channels > ring;
  }
};

// Whether writing `out` could change one of `others`. Different channel slices of one buffer do not overlap.
bool may_overlap(py::handle out, const py::tuple& others) {
  DLTensor t;
  describe(out, &t);
  const Extent written(t);
  for (const py::handle other : others) {
    if (other.is_none()) continue;
    describe(other, &t);
    if (written.meets(Extent(t))) return true;
  }
  return false;
}

}  // namespace

void bind_state(py::module_& m) {
  m.def("signature", &signature, py::arg("arguments"));
  m.def("tensor_states", &tensor_states, py::arg("tensors"), py::arg("complete") = false);
  m.def("may_overlap", &may_overlap, py::arg("out"), py::arg("others"));
}
