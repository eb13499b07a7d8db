// The functions by which the optional extension csrc/aten reads torch's tensors for this module: in a few instructions,
// where torch's Python attributes take hundreds. It is compiled for one version of torch; without it the core reads all
// through Python and DLPack, and gives the same bits.
#pragma once

#include <Python.h>

#include "tensor_view.h"

namespace fused_sam {

// A reference to a tensor as torch itself holds it, without an object for Python.
struct Handle;

struct Access {
  static constexpr int kVersion = 2;
  static constexpr const char* kCapsule = "fused_sam.access";

  int version;
  // Of an object of exactly torch's own classes: others may mean something else by the attributes of a tensor. All that
  // follow take only these.
  bool (*is_plain)(PyObject* object);
  // As read_tensor, and false for a negated view, which stores the opposite of its values.
  bool (*read)(PyObject* tensor, Device device, TensorView* view);
  bool (*read_handle)(const Handle* tensor, Device device, TensorView* view);
  // The gradient of a tensor, for `release` or `to_object`; null without one.
  Handle* (*grad_of)(PyObject* tensor);
  void (*clear_grad)(PyObject* tensor);
  // Tells autograd that the tensor has been written.
  void (*bump_version)(PyObject* tensor);
  // Whether nothing else refers to the tensor or its memory, which torch has allocated: a buffer of numpy's, or one
  // that processes share, is seen by others. False also where that is not certain: it has had an object.
  bool (*is_sole_owner)(const Handle* tensor);
  // Takes the reference and returns the tensor's object, or null with an error set.
  PyObject* (*to_object)(Handle* tensor);
  Handle* (*copy)(Handle* tensor);
  void (*release)(Handle* tensor);
  // A new tensor of one float64 number, shape [], on the CPU; null with an error set.
  PyObject* (*empty_number)();
};

}  // namespace fused_sam
