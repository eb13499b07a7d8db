// The ops as methods of a Batch.
#pragma once

#include <pybind11/pybind11.h>

#include "batch.h"

namespace fused_sam {

void bind_ops(pybind11::class_<Batch>& batch);

}  // namespace fused_sam
