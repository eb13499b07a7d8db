// The launches that the entry points (launch.h) are made of, each of one work list; where their kernels are, in the
// *.cu files.
#pragma once

#include "launch.h"
#include "work_list.h"

namespace fused_sam::cuda {

// What a norm adds to the arguments: where its blocks leave their numbers, how many blocks there are up to this launch,
// and whether it is the one that adds them up, with a counter of its own. `out` is a Norm. Where `again` says that a
// pass over powers follows, it finds their scale in the value, and is over at once unless there is a tensor.
struct NormTerms {
  double q;
  double* partials;
  Norm* out;
  uint32_t first_block, blocks;
  uint32_t ticket;
  bool last, again;
};
struct PerturbTerms {
  double q;
  const Norm* norm;  // finite q reads the value alone, q = 1 nothing
};
struct UpdateTerms {
  const float* grad_scale;  // may be null
  const float* found_inf;   // may be null

  FUSED_SAM_HD float multiplier() const { return grad_scale == nullptr ? 1.0f : 1.0f / *grad_scale; }
  FUSED_SAM_HD bool skip() const { return found_inf != nullptr && *found_inf != 0.0f; }
};
// All that `restore_accumulate` is told is in the groups.
struct AccumulateUnits {};

// Bytes of entries and groups in a launch.
size_t launch_capacity();

void launch_norm(const Target&, const WorkList<AscentTerms>&, const NormTerms&);
void launch_peak(const Target&, const WorkList<AscentTerms>&, const NormTerms&);
void launch_powers(const Target&, const WorkList<AscentTerms>&, const NormTerms&);
void clear_norm(const Target&, Norm* out);
void launch_perturb(const Target&, const WorkList<AscentTerms>&, const PerturbTerms&);
void launch_accumulate(const Target&, const WorkList<AccumulateTerms>&, const AccumulateUnits&);
void launch_sgd(const Target&, const WorkList<SgdTerms>&, const UpdateTerms&);
void launch_adam(const Target&, const WorkList<AdamTerms>&, const UpdateTerms&);

}  // namespace fused_sam::cuda
