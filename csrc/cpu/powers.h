// The block kernels of general p: elements [begin, begin + count) of a tensor. Compiled once, for any machine.
#pragma once

#include "../powers.h"

namespace fused_sam::cpu {

Peak peak(const Tensor& t, int64_t begin, int64_t count, const AscentGroup& group);

double sum_of_powers(const Tensor& t, int64_t begin, int64_t count, const AscentGroup& group, double q, double scale);

// backup <- w, w <- w + e. For infinite q only `element` moves, if it is in the block.
void power_perturb(const Tensor& t, int64_t begin, int64_t count, const AscentGroup& group, double q, double norm,
                   int64_t element);

}  // namespace fused_sam::cpu
