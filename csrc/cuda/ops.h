// Between the entry points (launch.h) and the two ways to run a slice: on a device (*.cu), or interpreted.
#pragma once

#include "arguments.h"
#include "launch.h"

namespace fused_sam::cuda {

// Units per launch that keep every multiprocessor of the largest GPUs busy without a long tail; fewer for the norm,
// which leaves one partial sum for each.
constexpr int64_t kMostUnits = 32768, kMostNormUnits = 8192;

#define FUSED_SAM_DECLARE_OPS(where)                                                            \
  namespace where {                                                                             \
  size_t capacity();                                                                            \
  void norm(const Target&, const Slice<AscentTerms>&, int shift, const NormTerms&);             \
  void peak(const Target&, const Slice<AscentTerms>&, int shift, const NormTerms&);             \
  void powers(const Target&, const Slice<AscentTerms>&, int shift, const NormTerms&);           \
  void power_perturb(const Target&, const Slice<AscentTerms>&, int shift, const PerturbTerms&); \
  void clear(const Target&, Norm* out);                                                         \
  void perturb(const Target&, const Slice<AscentTerms>&, int shift, const PerturbTerms&);       \
  void accumulate(const Target&, const Slice<MeanTerms>&, int shift, const MeanUnits&);         \
  void sgd_update(const Target&, const Slice<SgdTerms>&, int shift, const UpdateTerms&);        \
  void adam_update(const Target&, const Slice<AdamTerms>&, int shift, const UpdateTerms&);      \
  }
FUSED_SAM_DECLARE_OPS(device)
FUSED_SAM_DECLARE_OPS(interpreted)
#undef FUSED_SAM_DECLARE_OPS

}  // namespace fused_sam::cuda
