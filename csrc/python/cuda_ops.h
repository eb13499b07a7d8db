// The CUDA kernels as functions of a Batch.
#pragma once

#include <pybind11/pybind11.h>

#include "../cuda/launch.h"
#include "gather.h"

namespace fused_sam {

// Where to run what is done to a batch; batches of CPU tensors are interpreted.
cuda::Target target_of(const Batch& batch, uintptr_t stream);

void bind_cuda(pybind11::module_& module);

}  // namespace fused_sam
