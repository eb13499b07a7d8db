// The handful of torch's Python attributes that the optimizer's host side reads for every tensor of every step.
#pragma once

#include <Python.h>

#include <array>

#include "exchange_api.h"

namespace fused_sam {

// An attribute of torch.Tensor, or of a storage, that torch implements in C. Its descriptor is looked up once and used
// directly on objects of the plain classes, which halves the cost of an access; other classes may override it.
class Attribute {
 public:
  Attribute(PyObject* type, const char* name);

  PyObject* get(PyObject* object) const;              // new reference, or null with an error set
  bool set(PyObject* object, PyObject* value) const;  // false with an error set
  PyObject* call(PyObject* object) const;             // object.name(): new reference, or null with an error set

 private:
  bool direct(PyObject* object) const;

  PyObject* type_;
  PyObject* name_;
  PyObject* descriptor_;
};

// What the module needs of torch, looked up at first use and never freed: the interpreter may be gone when static
// destructors run. Throws pybind11::error_already_set if torch cannot be imported.
struct TorchApi {
  TorchApi();
  static const TorchApi& get();

  PyObject* tensor_type;
  PyObject* strided;
  std::array<PyObject*, 4> dtypes;  // in the order of DType
  PyObject* storage_use_count;      // null where this torch has none
  int (*describe)(void*, dlpack::Description*) = nullptr;
  Attribute grad, is_neg, use_count, untyped_storage, storage_cdata;

  // The use counts of a tensor that nothing else refers to; 0 where torch does not tell. They differ between versions
  // (a storage's Python object may hold a reference).
  long lone_tensor_uses = 0, lone_storage_uses = 0;

  // The counts of a tensor and of its storage, or false.
  bool count_uses(PyObject* tensor, long* tensor_uses, long* storage_uses) const;
};

}  // namespace fused_sam
