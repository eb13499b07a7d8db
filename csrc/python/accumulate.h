// restore_accumulate as functions of a Batch of means and one of parameters.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_sam {

// Into the module, and into its submodule `cuda`.
void bind_accumulate(pybind11::module_& module);

}  // namespace fused_sam
