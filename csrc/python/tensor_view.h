// Reading torch tensors without torch's headers, so that one binary serves every torch version.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>

#include "../types.h"
#include "exchange_api.h"

namespace fused_sam {

// Where a tensor lies: DLPack's number of the kind of device, and torch's of the device among those, from 0. Of CPUs
// there is one; what is none of the three kinds here is AMD's, which torch calls cuda as well.
struct Device {
  int32_t type, index;

  bool cpu() const { return type == dlpack::kCpu; }
  bool cuda() const { return type == dlpack::kCuda; }
  // Whether DLPack counts the devices of this kind as torch does. Those of Intel it does not.
  bool numbered_alike() const { return type != dlpack::kOneApi; }
  // As torch calls the kind, and the device.
  std::string kind() const { return cpu() ? "cpu" : type == dlpack::kOneApi ? "xpu" : "cuda"; }
  std::string name() const { return cpu() ? kind() : kind() + ":" + std::to_string(index); }
  bool operator==(const Device& other) const { return type == other.type && (cpu() || index == other.index); }
  bool operator!=(const Device& other) const { return !(*this == other); }
};

// What a kernel needs to know of a tensor. shape and strides belong to the tensor (or to `owned`).
struct TensorView {
  static constexpr int kMaxDims = 64;

  void* data;
  int64_t numel;
  DType dtype;
  int ndim;
  bool contiguous;  // elements lie in the order of their indices, without gaps
  const int64_t* shape;
  const int64_t* strides;
  int64_t owned[2 * kMaxDims];
};

// Reads a tensor that kernels can take by pointer: strided, on the device, of one of the four dtypes. False for any
// other object or tensor; a Python error is never left behind.
bool read_tensor(PyObject* object, Device device, TensorView* view);

// Fills in how many elements a view has, and whether it is contiguous. False for a number, or an address, that kernels
// cannot take.
bool count_elements(TensorView* view);

// Distinct elements have distinct addresses and no address between the first and the last is unused.
bool is_dense(const TensorView& view);

// Elements of equal index lie at equal offsets (strides of dimensions of size 1 do not matter).
bool same_layout(const TensorView& a, const TensorView& b);

// True if this reference is the only way to reach the tensor's memory: no other Python or C++ reference to the tensor,
// no other tensor on its storage. `references` is how many Python references the caller itself accounts for.
bool is_sole_owner(PyObject* tensor, Py_ssize_t references);

}  // namespace fused_sam
