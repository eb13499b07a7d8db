// Between the entry points (launch.h) and the two ways to run a launch: on a device (*.cu), or on the host.
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

// Lanes of a full tree: lane k takes in lane k + half, for every half. Shuffles on the device do the same additions.
FUSED_SAM_HD double add_pairwise(double* lanes, int count) {
  for (int half = count / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

template <class Group, class Terms>
using Launch = void (*)(const Target&, const WorkList<Group>&, const Terms&);

// The ops of one way to run them.
struct Ops {
  size_t (*capacity)();  // bytes of entries and groups in a launch
  Launch<AscentTerms, NormTerms> norm, peak, powers;
  void (*clear)(const Target&, Norm* out);
  Launch<AscentTerms, PerturbTerms> perturb;
  Launch<AccumulateTerms, AccumulateUnits> accumulate;
  Launch<SgdTerms, UpdateTerms> sgd_update;
  Launch<AdamTerms, UpdateTerms> adam_update;
};

// Throws std::runtime_error in builds without CUDA.
const Ops& device_ops();
const Ops& host_ops();

}  // namespace fused_sam::cuda
