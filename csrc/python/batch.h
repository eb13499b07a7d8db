// From the parallel Python lists of an op to the descriptors of the kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../kernels.h"
#include "held_tensor.h"
#include "tensor_view.h"

namespace fused_sam {

// The tensors of one op, read once. Lists may be None or hold None. The tensors are kept alive as long as this object,
// though a kernel runs without the interpreter lock.
class Batch {
 public:
  // `grads` are `Gradients`, a list, or None. `backups` is a list, None, or the batch of the ascent whose backups are
  // to be used.
  // `device_type` and `device_index` say where the tensors are, as in `Device`.
  // `states` holds at most kStates lists; `masters` the fp32 copies of 16-bit parameters, or None. Throws ValueError
  // unless all lists have the length of `params`. `for_gpu`: kernels of a GPU take it.
  Batch(const pybind11::list& params, const pybind11::object& grads, const pybind11::object& backups,
        const pybind11::tuple& states, const pybind11::object& masters, int device_type, int device_index,
        bool for_gpu);

  Device device() const { return device_; }
  bool for_gpu() const { return for_gpu_; }

  // The descriptors as they were read. Those at unsupported() mean nothing.
  const std::vector<Tensor>& tensors() const { return tensors_; }

  // Indices of the tensors that take part in the op but that the kernels cannot take as they lie in memory.
  const std::vector<Py_ssize_t>& unsupported() const { return unsupported_; }

  // Finds memory for w of every parameter with a gradient: the gradient's own where it is large and `owned` and nothing
  // but this object and one Python list refers to it, else memory that lasts as long as this object. A master is its
  // own.
  void make_backups(bool owned);

  // Throws ValueError unless there is a fitting backup for every gradient, and none where there is a master.
  void set_backups(const pybind11::list& backups);

  // The descriptors; group k covers the next sizes[k] tensors. Throws ValueError where unsupported() is not empty, for
  // sizes that do not add up, and for written tensors that overlap.
  const std::vector<Tensor>& gather(const std::vector<int64_t>& sizes);

  // Has the kernels read the step of every tensor with a gradient: float32 tensors of one element, kept alive by the
  // caller. None: they do not. Throws ValueError for any other.
  void read_steps(const pybind11::object& steps);

  // The tensors of torch that hold backups made here, or by the ascent whose backups are used.
  pybind11::list memory();

  // True for every parameter that has a backup, None for the others.
  pybind11::list has_backup() const;

  // Lets go of everything but the backups, of the first `displaced` tensors: what an ascent has to keep between the
  // passes.
  void keep_backups(size_t displaced = SIZE_MAX);

  // Reads the parameters once more: between two calls they may have been given other memory. Throws ValueError if they
  // no longer fit.
  void refresh();

 private:
  bool describe(Py_ssize_t index, Tensor* out);
  void* make_pool(int64_t bytes);
  void* hold(PyObject* memory);
  bool read_weights(Py_ssize_t index, TensorView* param, TensorView* master, Tensor* out) const;
  void use_backups_of(const Batch& ascent);

  Device device_;
  bool for_gpu_;
  Py_ssize_t count_;
  pybind11::tuple params_, backups_, masters_, states_[kStates];
  std::shared_ptr<Gradients> grads_;          // null without any
  std::vector<HeldTensor> memory_;            // torch's, of the backups made here
  std::vector<std::shared_ptr<void>> pools_;  // of small backups on the CPU
  std::vector<Tensor> tensors_;
  std::vector<uint64_t> layouts_;  // of the parameters that take part
  std::vector<Py_ssize_t> unsupported_;
  bool disjoint_ = false;  // whether that has been found of `tensors_` as they are
};

// The first members of groups given as tuples: how many tensors each covers.
template <class Tuple>
std::vector<int64_t> sizes_of(const std::vector<Tuple>& groups) {
  std::vector<int64_t> sizes;
  for (const Tuple& group : groups) sizes.push_back(std::get<0>(group));
  return sizes;
}

// Throws ValueError unless every tensor with a gradient has a backup.
inline void require_backups(const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors) {
    if (t.grad != nullptr && t.backup == nullptr && t.numel > 0) {
      throw pybind11::value_error("Invalid backups. A parameter with a gradient must have one.");
    }
  }
}

// Throws ValueError unless every tensor with a gradient has the k-th state in the groups that need it.
template <class Needed>
void require_state(const std::vector<Tensor>& tensors, int k, const Needed& needed) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    if (t.grad != nullptr && t.numel > 0 && t.state[k] == nullptr && needed(static_cast<size_t>(t.group))) {
      throw pybind11::value_error("Invalid state " + std::to_string(k) + " at index " + std::to_string(i) +
                                  ". There must be one for every gradient of a group that uses it.");
    }
  }
}

// That of SGD: momentum buffers.
template <class GroupOf>
void require_momentum(const std::vector<Tensor>& tensors, const GroupOf& group_of) {
  require_state(tensors, 0, [&](size_t group) { return group_of(group).momentum != 0.0; });
}

// That of Adam, with a step for the kernel to read where the group does not hold its corrections.
template <class GroupOf>
void require_adam_state(const std::vector<Tensor>& tensors, const GroupOf& group_of) {
  for (int k : {0, 1}) require_state(tensors, k, [](size_t) { return true; });
  require_state(tensors, 2, [&](size_t group) { return group_of(group).amsgrad; });
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    if (t.grad != nullptr && t.step == nullptr && group_of(static_cast<size_t>(t.group)).correction1 == 0.0) {
      throw pybind11::value_error("Invalid step at index " + std::to_string(i) +
                                  ". There must be one for every gradient of a group without corrections.");
    }
  }
}

}  // namespace fused_sam
