// The CUDA kernels as functions of a Batch.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_sam {

void bind_cuda(pybind11::module_& module);

}  // namespace fused_sam
