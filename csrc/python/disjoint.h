// Whether the tensors that a kernel writes lie in different memory.
#pragma once

#include <vector>

#include "../kernels.h"

namespace fused_sam {

// Throws ValueError if two of parameters, rounded copies, states and, where asked for, backups overlap: they would be
// updated in no particular order. All must be dense.
void require_disjoint(const std::vector<Tensor>& tensors, bool with_backups);

}  // namespace fused_sam
