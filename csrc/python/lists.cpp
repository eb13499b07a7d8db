#include "lists.h"

#include <algorithm>

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

py::list get_grads(const py::list& params) {
  const Attribute& grad = TorchApi::get().grad;
  py::list grads(params.size());
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
    PyObject* value = grad.get(PyList_GET_ITEM(params.ptr(), i));
    if (value == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(grads.ptr(), i, value);
  }
  return grads;
}

void clear_grads(const py::list& params) {
  const Attribute& grad = TorchApi::get().grad;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
    if (!grad.set(PyList_GET_ITEM(params.ptr(), i), Py_None)) throw py::error_already_set();
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

}  // namespace fused_sam
