// The dtypes that the work of a warp is compiled for.
#pragma once

#include "rounded_copy.h"
#include "terms.h"

namespace fused_sam::cuda {

// The dtypes of a unit's tensor, as kernels know them: each kernel exists for lists of one kind, where they are
// constant, and as `AnyTypes` for lists of several. In the former, what is constant for a launch is tested outside of
// the loops.
template <class P, class G, class M = NoRounded>
struct OneType {
  static constexpr bool kConstant = true;
  static constexpr size_t kSize = sizeof(P);
  template <class E, class F>
  static FUSED_SAM_HD void dispatch(const E&, const F& f) {
    f(P{}, G{}, M{});
  }
};

struct AnyTypes {
  static constexpr bool kConstant = false;
  template <class E, class F>
  static FUSED_SAM_HD void dispatch(const E& entry, const F& f) {
    fused_sam::dispatch(entry.dtype(), entry.grad_dtype(), entry.rounded_dtype(), f);
  }
};

}  // namespace fused_sam::cuda
