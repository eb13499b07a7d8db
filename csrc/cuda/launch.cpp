#include "launch.h"

#include <cmath>

#include "targets.h"

namespace fused_sam::cuda {
namespace {

bool has_grad(const Tensor& t) {
  return t.grad != nullptr;
}

// Whether a base step does anything to a tensor.
bool moves(const Tensor& t) {
  return t.grad != nullptr || t.backup != nullptr;
}

const Ops& ops_of(const Target& target) {
  return target.device < 0 ? host_ops() : device_ops();
}

// Launches an op on the tensors that take part. *covered tells how many tensors, from the first on, that is done for.
template <class Group, class Terms, class Takes>
void run(const Target& target, const std::vector<Tensor>& tensors, const std::vector<Group>& groups, const Terms& terms,
         Launch<Group, Terms> Ops::* op, const Takes& takes, bool numbered = false, size_t* covered = nullptr) {
  require_representable(tensors);
  const Ops& ops = ops_of(target);
  const Cut cut{shift_of(tensors, takes), ops.capacity(), false, numbered};
  for_each_launch(tensors, groups, cut, takes, [&](const WorkList<Group>& list, bool, size_t end) {
    (ops.*op)(target, list, terms);
    if (covered != nullptr) *covered = end;
  });
}

// As many blocks as all launches of a norm can have: each run of tensors leaves less than one of them without work.
int64_t most_norm_blocks(const std::vector<Tensor>& tensors) {
  const int shift = shift_of(tensors, has_grad);
  int64_t units = 0, taken = 0;
  for (const Tensor& t : tensors) {
    if (t.numel == 0 || !has_grad(t)) continue;
    units += units_of(t.numel, shift);
    ++taken;
  }
  return taken == 0 ? 0 : units / kUnitsPerBlock + taken / static_cast<int64_t>(kRun) + 1;
}

}  // namespace

std::string driver_why_not(int driver, int toolkit) {
  const auto name = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  if (driver == 0) return "no NVIDIA driver is loaded on this machine";
  // Any driver of the toolkit's major version runs its code.
  if (driver / 1000 >= toolkit / 1000) return "";
  return "the NVIDIA driver supports CUDA " + name(driver) + ", but the kernels were built with CUDA " + name(toolkit) +
         ": update the driver, or rebuild with an nvcc of CUDA " + std::to_string(driver / 1000);
}

std::string architecture_why_not(const std::string& built_for, const std::string& capability, int device) {
  return "the kernels were built for " + built_for + ", not for sm_" + capability + " of device " +
         std::to_string(device) + ": reinstall with FUSED_SAM_CUDA_ARCHITECTURES=" + capability;
}

std::vector<UnitPlace> units(const std::vector<int64_t>& numels, bool grouped) {
  std::vector<Tensor> tensors;
  for (const int64_t numel : numels) {
    // The address tells the tensor's number; nothing is read there.
    auto* number = reinterpret_cast<void*>(tensors.size() + 1);
    const auto group = grouped ? static_cast<int32_t>(tensors.size()) : 0;
    Tensor t{};
    t.param = t.grad = t.backup = number;
    t.numel = numel;
    t.group = group;
    tensors.push_back(t);
  }
  const std::vector<AscentTerms> groups(grouped ? tensors.size() : 1);
  const Cut cut{shift_of(tensors, has_grad), host_ops().capacity(), false, false};
  std::vector<UnitPlace> places;
  int64_t launch = 0;
  for_each_launch(tensors, groups, cut, has_grad, [&](const WorkList<AscentTerms>& list, bool, size_t) {
    const auto walk = list.arguments().walk();
    for (uint32_t i = 0; i < walk.units; ++i) {
      const auto unit = walk.locate(i);
      const auto tensor = static_cast<int64_t>(reinterpret_cast<uintptr_t>(unit.entry->param())) - 1;
      places.push_back({launch, tensor, unit.begin, unit.count});
    }
    ++launch;
  });
  return places;
}

int64_t norm_partials(const std::vector<Tensor>& tensors, double q) {
  return (q == 2.0 ? 1 : 3) * most_norm_blocks(tensors);
}

void norm(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AscentTerms>& groups, double q,
          double* partials, Norm* out) {
  require_representable(tensors);
  const Ops& ops = ops_of(target);
  if (most_norm_blocks(tensors) == 0) return ops.clear(target, out);
  // Which units share a block must not depend on how much a launch takes.
  const Cut cut{shift_of(tensors, has_grad), ops.capacity(), true, true};
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
  run_pass(q == 2.0 ? ops.norm : ops.peak);
  if (again) run_pass(ops.powers);
}

void perturb(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AscentTerms>& groups, double q,
             const Norm* norm, size_t* displaced) {
  run(target, tensors, groups, PerturbTerms{q, norm}, &Ops::perturb, has_grad, true, displaced);
}

void restore(const Target& target, const std::vector<Tensor>& tensors) {
  std::vector<Tensor> moved = tensors;
  for (Tensor& t : moved) {
    t.grad = nullptr;
    t.group = 0;
  }
  run(target, moved, std::vector<SgdTerms>(1), UpdateTerms{}, &Ops::sgd_update, moves);
}

void restore_accumulate(const Target& target, const std::vector<Tensor>& tensors,
                        const std::vector<AccumulateTerms>& groups) {
  run(target, tensors, groups, AccumulateUnits{}, &Ops::accumulate, moves);
}

void sgd_update(const Target& target, const std::vector<Tensor>& tensors, const std::vector<SgdTerms>& groups,
                const float* grad_scale, const float* found_inf) {
  run(target, tensors, groups, UpdateTerms{grad_scale, found_inf}, &Ops::sgd_update, moves);
}

void adam_update(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AdamTerms>& groups,
                 const float* grad_scale, const float* found_inf) {
  run(target, tensors, groups, UpdateTerms{grad_scale, found_inf}, &Ops::adam_update, moves);
}

}  // namespace fused_sam::cuda
