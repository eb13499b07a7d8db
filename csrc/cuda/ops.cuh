// The ops of device_ops(), one in each *.cu file.
#pragma once

#include "targets.h"

namespace fused_sam::cuda::device {

void norm(const Target&, const WorkList<AscentTerms>&, const NormTerms&);
void peak(const Target&, const WorkList<AscentTerms>&, const NormTerms&);
void powers(const Target&, const WorkList<AscentTerms>&, const NormTerms&);
void clear(const Target&, Norm* out);
void perturb(const Target&, const WorkList<AscentTerms>&, const PerturbTerms&);
void accumulate(const Target&, const WorkList<AccumulateTerms>&, const AccumulateUnits&);
void sgd_update(const Target&, const WorkList<SgdTerms>&, const UpdateTerms&);
void adam_update(const Target&, const WorkList<AdamTerms>&, const UpdateTerms&);

}  // namespace fused_sam::cuda::device
