// A Batch as columns of int64 numbers, for kernels that read them in device memory.
#pragma once

#include <pybind11/pybind11.h>

#include "batch.h"

namespace fused_sam {

void bind_columns(pybind11::class_<Batch>& batch);

}  // namespace fused_sam
