#include "lists.h"

#include <algorithm>
#include <string>

#include "torch_api.h"

namespace py = pybind11;

namespace fused_sam {
namespace {

// Finds the entries of one parameter after the other. State that was made in the order of the parameters is walked:
// to find an entry by its tensor, the dict has to hash that, which torch does in Python.
class Entries {
 public:
  explicit Entries(const py::dict& state) : state_(state.ptr()) {}

  // A borrowed reference, or null without an entry. Throws what the dict raises.
  PyObject* of(PyObject* param) {
    Py_ssize_t position = position_;
    PyObject *key = nullptr, *entry = nullptr;
    if (PyDict_Next(state_, &position, &key, &entry) && key == param) {
      position_ = position;
      return entry;
    }
    entry = PyDict_GetItemWithError(state_, param);
    if (entry == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return entry;
  }

 private:
  PyObject* state_;
  Py_ssize_t position_ = 0;
};

}  // namespace

py::tuple require_length(const py::object& list, Py_ssize_t count, const char* name) {
  py::tuple items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(list.ptr()));
  if (!items) throw py::error_already_set();
  require_length(static_cast<Py_ssize_t>(items.size()), count, name);
  return items;
}

void require_length(Py_ssize_t size, Py_ssize_t count, const char* name) {
  if (size == count) return;
  throw py::value_error("Invalid len(" + std::string(name) + ")=" + std::to_string(size) +
                        ". Must be len(params)=" + std::to_string(count) + ".");
}

void clear_grads(const py::list& params) {
  const TorchApi& api = TorchApi::get();
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
    PyObject* param = PyList_GET_ITEM(params.ptr(), i);
    if (api.reads(param)) {
      api.access->clear_grad(param);
    } else if (!api.grad.set(param, Py_None)) {
      throw py::error_already_set();
    }
  }
}

py::list lookup(const py::dict& state, const py::list& params, const py::str& key) {
  py::list values(params.size());
  Entries entries(state);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
    PyObject* entry = entries.of(PyList_GET_ITEM(params.ptr(), i));
    PyObject* value = entry != nullptr && PyDict_Check(entry) ? PyDict_GetItemWithError(entry, key.ptr()) : Py_None;
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    PyList_SET_ITEM(values.ptr(), i, Py_NewRef(value == nullptr ? Py_None : value));
  }
  return values;
}

bool all_present(const py::list& entries) {
  return std::all_of(entries.begin(), entries.end(), [](const py::handle& entry) { return !entry.is_none(); });
}

void increment_version(const py::list& tensors) {
  const TorchApi& api = TorchApi::get();
  py::list others;
  for (const py::handle& tensor : tensors) {
    if (api.reads(tensor.ptr())) {
      api.access->bump_version(tensor.ptr());
    } else {
      others.append(tensor);
    }
  }
  if (others.empty()) return;
  const auto done = py::reinterpret_steal<py::object>(PyObject_CallOneArg(api.increment_version, others.ptr()));
  if (!done) throw py::error_already_set();
}

}  // namespace fused_sam
