// What Python keeps beside each parameter of a list: its gradient, its entry in the state.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_sam {

// The list as a tuple. Throws ValueError, by the name of the list, unless it has `count` entries.
pybind11::tuple require_length(const pybind11::object& list, Py_ssize_t count, const char* name);
void require_length(Py_ssize_t size, Py_ssize_t count, const char* name);

// p.grad = None for every parameter.
void clear_grads(const pybind11::list& params);

// [state.get(p, {}).get(key) for p in params].
pybind11::list lookup(const pybind11::dict& state, const pybind11::list& params, const pybind11::str& key);

// Whether no entry is None.
bool all_present(const pybind11::list& entries);

// Tells autograd that all tensors have been written.
void increment_version(const pybind11::list& tensors);

}  // namespace fused_sam
