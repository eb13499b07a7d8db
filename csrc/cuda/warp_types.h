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

// Returns f(types) for the dtypes that a list's tensors have in common if those are usual, else f(AnyTypes{}).
template <class F>
auto with_types(const CommonTypes& types, const F& f) {
  if (types.are(DType::f32, DType::f32)) return f(OneType<float, float>{});
  if (types.are(DType::bf16, DType::bf16)) return f(OneType<bf16, bf16>{});
  if (types.are(DType::f16, DType::f16)) return f(OneType<f16, f16>{});
  if (types.are(DType::f64, DType::f64)) return f(OneType<double, double>{});
  if (types.are(DType::f32, DType::bf16, DType::bf16)) return f(OneType<float, bf16, bf16>{});
  if (types.are(DType::f32, DType::f16, DType::f16)) return f(OneType<float, f16, f16>{});
  return f(AnyTypes{});
}

}  // namespace fused_sam::cuda
