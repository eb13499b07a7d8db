// The handful of torch's Python attributes that the optimizer's host side reads for every tensor of every step.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "access.h"
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

  // Has the extension read tensors from now on, whose capsule this is; None: nothing but Python and DLPack. Throws
  // ValueError for that of another build.
  static void read_through(const pybind11::object& capsule);
  // Whether the extension reads this tensor.
  bool reads(PyObject* tensor) const { return reading && access->is_plain(tensor); }

  PyObject* tensor_type;
  PyObject* strided;
  PyObject *torch, *empty_name, *empty_like_name, *empty_keywords, *uint8;
  std::array<PyObject*, 4> dtypes;  // in the order of DType
  PyObject* storage_use_count;      // null where this torch has none
  PyObject* increment_version;
  int (*describe)(void*, dlpack::Description*) = nullptr;
  const Access* access = nullptr;  // stays, once there is one: handles may be held
  bool reading = false;            // whether it is to be used
  Attribute grad, is_neg, data_ptr, use_count, untyped_storage, storage_cdata, storage_resizable;

  // torch.empty and torch.empty_like: new references, or null with an error set.
  PyObject* empty_number() const;  // float64, shape [], on the CPU
  PyObject* empty_bytes(int64_t bytes, Device device) const;
  PyObject* empty_like(PyObject* tensor) const { return PyObject_CallMethodOneArg(torch, empty_like_name, tensor); }

  // How often the C++ tensor, its storage and the storage's Python object are referred to, and whether the memory is
  // torch's own: that of others, numpy's or what processes share, cannot be resized.
  struct Uses {
    long tensor = 0, storage = 0, storage_object = 0;
    bool resizable = false;
    bool operator==(const Uses& other) const {
      return tensor == other.tensor && storage == other.storage && storage_object == other.storage_object &&
             resizable == other.resizable;
    }
  };
  // False where torch does not tell.
  bool count_uses(PyObject* tensor, Uses* uses) const;

  // Of a tensor that nothing else refers to, where torch tells: they differ between versions.
  bool counts_uses = false;
  Uses lone;
};

}  // namespace fused_sam
