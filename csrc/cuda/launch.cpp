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

// How a norm is cut; which units share a block must not depend on `capacity`.
Cut norm_cut(const std::vector<Tensor>& tensors, size_t capacity) {
  return {shift_of(tensors, has_grad), capacity, true, true};
}

// Blocks of all launches of a norm.
int64_t norm_blocks(const std::vector<Tensor>& tensors) {
  const int shift = norm_cut(tensors, 0).shift;
  int64_t blocks = 0, units = 0;
  size_t taken = 0;
  for (const Tensor& t : tensors) {
    if (t.numel == 0 || !has_grad(t)) continue;
    if (taken++ % kRun == 0) {
      blocks += (units + kUnitsPerBlock - 1) / kUnitsPerBlock;
      units = 0;
    }
    units += units_of(t.numel, shift);
  }
  return blocks + (units + kUnitsPerBlock - 1) / kUnitsPerBlock;
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
  return (q == 2.0 ? 1 : 3) * norm_blocks(tensors);
}

void norm(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AscentTerms>& groups, double q,
          double* partials, Norm* out) {
  require_representable(tensors);
  const Ops& ops = ops_of(target);
  const int64_t blocks = norm_blocks(tensors);
  if (blocks == 0) return ops.clear(target, out);
  const auto run_pass = [&](Launch<AscentTerms, NormTerms> pass) {
    NormTerms terms{q, partials, out, 0, static_cast<uint32_t>(blocks), 0, false};
    const Cut cut = norm_cut(tensors, ops.capacity());
    for_each_launch(tensors, groups, cut, has_grad, [&](const WorkList<AscentTerms>& list, bool last, size_t) {
      terms.last = last;
      pass(target, list, terms);
      terms.first_block += list.blocks();
    });
  };
  if (q == 2.0) return run_pass(ops.norm);
  run_pass(ops.peak);
  if (!std::isinf(q)) run_pass(ops.powers);
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
