// From the parallel Python lists of an op to the descriptors of the kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../kernels.h"

namespace fused_sam {

// p.grad of every parameter, as a list.
pybind11::list get_grads(const pybind11::list& params);

// p.grad = None for every parameter.
void clear_grads(const pybind11::list& params);

// [state.get(p, {}).get(key) for p in params].
pybind11::list lookup(const pybind11::dict& state, const pybind11::list& params, const pybind11::str& key);

// The tensors of one op, read once. Lists may be None or hold None. The tensors are kept alive as long as this object,
// though a kernel runs without the interpreter lock.
class Batch {
 public:
  // `backups` is a list, None, or the batch of the ascent whose backups are to be used.
  // Throws ValueError unless all lists have the length of `params`.
  Batch(const pybind11::list& params, const pybind11::object& grads, const pybind11::object& backups,
        const pybind11::object& momentum);

  // Indices of the tensors that take part in the op but that the kernels cannot take as they lie in memory.
  const std::vector<Py_ssize_t>& odd() const { return odd_; }

  // Finds memory for w of every parameter with a gradient: the gradient's own where it is large and `owned` and nothing
  // but this object and one Python list refers to it, else memory that lasts as long as this object.
  void make_backups(bool owned);

  // Throws ValueError unless there is a fitting backup for every gradient.
  void set_backups(const pybind11::list& backups);

  // The descriptors; group k covers the next sizes[k] tensors. Throws ValueError where odd() is not empty, for sizes
  // that do not add up, and for written tensors that overlap.
  const std::vector<Tensor>& gather(const std::vector<int64_t>& sizes);

  // True for every parameter that has a backup, None for the others.
  pybind11::list kept() const;

  // Lets go of everything but the backups: what an ascent has to keep between the passes.
  void keep_backups();

  // Reads the parameters once more: between two calls they may have been given other memory. Throws ValueError if they
  // no longer fit.
  void refresh();

 private:
  bool describe(Py_ssize_t index, Tensor* out);
  void adopt_backups(const Batch& ascent);
  void require_disjoint() const;

  Py_ssize_t count_;
  pybind11::tuple params_, grads_, backups_, momentum_;
  pybind11::list memory_;  // what make_backups allocated
  std::vector<Tensor> tensors_;
  std::vector<uint64_t> layouts_;  // of the parameters that take part
  std::vector<Py_ssize_t> odd_;
};

}  // namespace fused_sam
