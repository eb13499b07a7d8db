// What a lane adds to the norm of the momentum, when its warp has written a unit of it.
#pragma once

#include "unit_kernels.h"

namespace fused_sam::cuda {

// What norm_unit gives of the unit, with the momentum in the gradient's place.
template <class E>
FUSED_SAM_HD double momentum_unit(const Unit<E>& u, int lane) {
  double sum = 0.0;
  dispatch(u.entry->dtype(), u.entry->dtype(), [&](auto p, auto g) {
    using P = decltype(p);
    using G = decltype(g);
    const G* m = static_cast<const G*>(u.entry->state(0)) + u.begin;
    sum = sum_of_squares<P, G, false>(nullptr, m, AscentGroup{}, u.count, lane);
  });
  return sum;
}

}  // namespace fused_sam::cuda
