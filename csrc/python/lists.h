// What Python keeps beside each parameter of a list: its gradient, its entry in the state.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_sam {

// p.grad of every parameter, as a list.
pybind11::list get_grads(const pybind11::list& params);

// p.grad = None for every parameter.
void clear_grads(const pybind11::list& params);

// [state.get(p, {}).get(key) for p in params].
pybind11::list lookup(const pybind11::dict& state, const pybind11::list& params, const pybind11::str& key);

// Whether no entry is None.
bool all_present(const pybind11::list& entries);

}  // namespace fused_sam
