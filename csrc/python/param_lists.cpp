#include "param_lists.h"

#include "torch_api.h"

namespace py = pybind11;

namespace fused_sam {

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
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
    PyObject* entry = PyDict_GetItemWithError(state.ptr(), PyList_GET_ITEM(params.ptr(), i));
    if (entry == nullptr && PyErr_Occurred()) throw py::error_already_set();
    PyObject* value = entry != nullptr && PyDict_Check(entry) ? PyDict_GetItemWithError(entry, key.ptr()) : Py_None;
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    PyList_SET_ITEM(values.ptr(), i, Py_NewRef(value == nullptr ? Py_None : value));
  }
  return values;
}

}  // namespace fused_sam
