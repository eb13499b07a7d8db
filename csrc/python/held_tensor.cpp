#include "held_tensor.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "lists.h"
#include "torch_api.h"

namespace py = pybind11;

namespace fused_sam {
namespace {

const Access& access() {
  return *TorchApi::get().access;
}

bool is_negated(PyObject* tensor) {
  PyObject* answer = TorchApi::get().is_neg.call(tensor);
  if (answer == nullptr) PyErr_Clear();
  Py_XDECREF(answer);
  return answer != Py_False;
}

}  // namespace

HeldTensor::HeldTensor(py::object object) : object_(std::move(object)) {
  if (object_.is_none()) object_ = py::object();
}

HeldTensor HeldTensor::grad_of(PyObject* param) {
  const TorchApi& api = TorchApi::get();
  HeldTensor grad;
  if (api.reads(param)) {
    grad.handle_ = access().grad_of(param);
    return grad;
  }
  PyObject* object = api.grad.get(param);
  if (object == nullptr) throw py::error_already_set();
  return HeldTensor(py::reinterpret_steal<py::object>(object));
}

HeldTensor::HeldTensor(const HeldTensor& other)
    : handle_(other.handle_ ? access().copy(other.handle_) : nullptr), object_(other.object_) {}

HeldTensor::HeldTensor(HeldTensor&& other) noexcept
    : handle_(std::exchange(other.handle_, nullptr)), object_(std::move(other.object_)) {}

HeldTensor& HeldTensor::operator=(HeldTensor other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(object_, other.object_);
  return *this;
}

HeldTensor::~HeldTensor() {
  if (handle_ != nullptr) access().release(handle_);
}

bool HeldTensor::read(Device device, TensorView* view) const {
  if (handle_ != nullptr) return access().read_handle(handle_, device, view) && count_elements(view);
  return read_tensor(object_.ptr(), device, view) &&
         (TorchApi::get().reads(object_.ptr()) || !is_negated(object_.ptr()));
}

bool HeldTensor::is_sole_owner(Py_ssize_t references) {
  if (handle_ != nullptr && access().is_sole_owner(handle_)) return true;
  object();
  return fused_sam::is_sole_owner(object_.ptr(), references);
}

py::object HeldTensor::object() {
  if (handle_ != nullptr) {
    object_ = py::reinterpret_steal<py::object>(access().to_object(std::exchange(handle_, nullptr)));
    if (!object_) throw py::error_already_set();
  }
  return object_ ? object_ : py::object(py::none());
}

Gradients::Gradients(const py::list& params) : references_(1) {
  entries_.reserve(params.size());
  for (const py::handle& param : params) entries_.push_back(HeldTensor::grad_of(param.ptr()));
}

Gradients::Gradients(const py::object& list, Py_ssize_t count) : references_(2) {
  const py::tuple items = require_length(list, count, "grads");
  for (const py::handle& item : items) entries_.emplace_back(py::reinterpret_borrow<py::object>(item));
}

HeldTensor& Gradients::at(Py_ssize_t index) {
  const auto count = static_cast<Py_ssize_t>(size());
  if (index < 0) index += count;
  if (index < 0 || index >= count) throw py::index_error("Invalid index " + std::to_string(index) + " of gradients.");
  return entries_[static_cast<size_t>(index)];
}

bool Gradients::all_present() const {
  return std::all_of(entries_.begin(), entries_.end(), [](const HeldTensor& entry) { return entry.defined(); });
}

py::list Gradients::presence() const {
  py::list present;
  for (const HeldTensor& entry : entries_) present.append(entry.defined() ? py::object(py::bool_(true)) : py::none());
  return present;
}

void bind_gradients(py::module_& m) {
  py::class_<Gradients, std::shared_ptr<Gradients>>(m, "Gradients")
      .def(py::init<const py::list&>())
      .def("__len__", &Gradients::size)
      .def("__getitem__", [](Gradients& self, Py_ssize_t index) { return self.at(index).object(); })
      .def("__setitem__",
           [](Gradients& self, Py_ssize_t index, const py::object& grad) { self.at(index) = HeldTensor(grad); });
}

}  // namespace fused_sam
