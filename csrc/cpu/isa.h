// The choice among the instruction sets the kernels were compiled for.
#pragma once

#include "block_kernels.h"

namespace fused_sam::cpu {

// Of the best instruction set this machine has, or the one FUSED_SAM_CPU_ISA names.
const BlockKernels& block_kernels();

}  // namespace fused_sam::cpu
