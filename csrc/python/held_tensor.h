// Tensors that are held between two calls, and the gradients of a list of parameters.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "access.h"
#include "tensor_view.h"

namespace fused_sam {

// A reference to a tensor, or to none: as torch's own where the extension reads tensors, until Python asks for the
// object. An object would have to be made for every gradient of every step.
class HeldTensor {
 public:
  HeldTensor() = default;
  // None becomes none.
  explicit HeldTensor(pybind11::object object);
  // p.grad. Throws what Python raises.
  static HeldTensor grad_of(PyObject* param);

  HeldTensor(const HeldTensor& other);
  HeldTensor(HeldTensor&& other) noexcept;
  HeldTensor& operator=(HeldTensor other) noexcept;
  ~HeldTensor();

  bool defined() const { return handle_ != nullptr || object_; }
  bool is(PyObject* object) const { return defined() && object_.ptr() == object; }
  // As read_tensor, and false for a negated view.
  bool read(Device device, TensorView* view) const;
  // Whether its memory can be reached in no other way but by `references` Python references, ours among them.
  bool is_sole_owner(Py_ssize_t references);
  // The tensor, or None.
  pybind11::object object();

 private:
  Handle* handle_ = nullptr;
  pybind11::object object_;
};

// p.grad of every parameter at one moment. A sequence for Python.
class Gradients {
 public:
  explicit Gradients(const pybind11::list& params);
  // Of a list of the caller's, which goes on holding its entries. Throws ValueError unless there are `count`.
  Gradients(const pybind11::object& list, Py_ssize_t count);

  size_t size() const { return entries_.size(); }
  auto begin() const { return entries_.begin(); }
  auto end() const { return entries_.end(); }
  HeldTensor& operator[](size_t index) { return entries_[index]; }
  // Negative numbers count from the end. Throws IndexError.
  HeldTensor& at(Py_ssize_t index);
  bool all_present() const;
  // True for each that is there, None for the others.
  pybind11::list presence() const;
  // How many Python references to an entry are known.
  Py_ssize_t references() const { return references_; }

 private:
  std::vector<HeldTensor> entries_;
  Py_ssize_t references_;
};

void bind_gradients(pybind11::module_& m);

}  // namespace fused_sam
