// Ops as launches. Only in builds with CUDA.
#include <cmath>

#include "launches.h"

namespace fused_sam::cuda {
namespace {

// Whether a base step does anything to a tensor.
bool moves(const Tensor& t) {
  return t.grad != nullptr || t.backup != nullptr;
}

template <class Group, class Terms>
using Launch = void (*)(const Target&, const WorkList<Group>&, const Terms&);

// Launches an op on the tensors that take part. *covered tells how many tensors, from the first on, that is done for.
template <class Group, class Terms, class Takes>
void run(const Target& target, const std::vector<Tensor>& tensors, const std::vector<Group>& groups, const Terms& terms,
         Launch<Group, Terms> op, const Takes& takes, bool numbered = false, size_t* covered = nullptr) {
  require_representable(tensors);
  const Cut cut{shift_of(tensors, takes), launch_capacity(), false, numbered};
  for_each_launch(tensors, groups, cut, takes, [&](const WorkList<Group>& list, bool, size_t end) {
    op(target, list, terms);
    if (covered != nullptr) *covered = end;
  });
}

}  // namespace

void norm(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AscentTerms>& groups, double q,
          double* partials, Norm* out) {
  require_representable(tensors);
  if (most_norm_blocks(tensors) == 0) return clear_norm(target, out);
  // Which units share a block must not depend on how much a launch takes.
  const Cut cut{shift_of(tensors, has_grad), launch_capacity(), true, true};
  const bool again = q == 2.0 ? holds_f64(tensors.data(), tensors.size()) : !std::isinf(q);
  const auto run_pass = [&](Launch<AscentTerms, NormTerms> pass) {
    NormTerms terms{q, partials, out, 0, 0, 0, false, again};
    for_each_launch(tensors, groups, cut, has_grad, [&](const WorkList<AscentTerms>& list, bool last, size_t) {
      terms.first_block = terms.blocks;
      terms.blocks += list.blocks();
      terms.last = last;
      pass(target, list, terms);
    });
  };
  run_pass(q == 2.0 ? launch_norm : launch_peak);
  if (again) run_pass(launch_powers);
}

void perturb(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AscentTerms>& groups, double q,
             const Norm* norm, size_t* displaced) {
  run(target, tensors, groups, PerturbTerms{q, norm}, launch_perturb, has_grad, true, displaced);
}

void restore(const Target& target, const std::vector<Tensor>& tensors) {
  std::vector<Tensor> moved = tensors;
  for (Tensor& t : moved) {
    t.grad = nullptr;
    t.group = 0;
  }
  run(target, moved, std::vector<SgdTerms>(1), UpdateTerms{}, launch_sgd, moves);
}

void restore_accumulate(const Target& target, const std::vector<Tensor>& tensors,
                        const std::vector<AccumulateTerms>& groups) {
  run(target, tensors, groups, AccumulateUnits{}, launch_accumulate, moves);
}

void sgd_update(const Target& target, const std::vector<Tensor>& tensors, const std::vector<SgdTerms>& groups,
                const float* grad_scale, const float* found_inf) {
  run(target, tensors, groups, UpdateTerms{grad_scale, found_inf}, launch_sgd, moves);
}

void adam_update(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AdamTerms>& groups,
                 const float* grad_scale, const float* found_inf) {
  run(target, tensors, groups, UpdateTerms{grad_scale, found_inf}, launch_adam, moves);
}

}  // namespace fused_sam::cuda
