#include "launch.h"

#include <cmath>

#include "ops.h"

namespace fused_sam::cuda {
namespace {

bool has_grad(const Tensor& t) {
  return t.grad != nullptr;
}

// Ascents have no use for the momentum buffer's place: it tells the tensor's number in the list instead.
std::vector<Tensor> with_numbers(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> numbered = tensors;
  for (size_t i = 0; i < numbered.size(); ++i) numbered[i].state[0] = reinterpret_cast<void*>(i);
  return numbered;
}

// Whether a base step does anything to a tensor.
bool moves(const Tensor& t) {
  return t.grad != nullptr || t.backup != nullptr;
}

bool on_host(const Target& target) {
  return target.device < 0;
}

size_t capacity(const Target& target) {
  return on_host(target) ? interpreted::capacity() : device::capacity();
}

// Runs `op` (a pair of functions, for the host and for a device) on every slice of the tensors that take part.
template <class Group, class Terms, class Takes>
void run(const Target& target, const std::vector<Tensor>& tensors, const std::vector<Group>& groups, const Terms& terms,
         void (*on_device)(const Target&, const Slice<Group>&, int, const Terms&),
         void (*interpret)(const Target&, const Slice<Group>&, int, const Terms&), const Takes& takes) {
  const int shift = shift_of(tensors, kMostUnits, takes);
  for (const auto& slice : slices_of(tensors, groups, shift, capacity(target), takes)) {
    (on_host(target) ? interpret : on_device)(target, slice, shift, terms);
  }
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
  const int shift = shift_of(tensors, kMostUnits, has_grad);
  std::vector<UnitPlace> places;
  int64_t launch = 0;
  for (const auto& slice : slices_of(tensors, groups, shift, interpreted::capacity(), has_grad)) {
    const Walk<SlimEntry> walk{slice.entries.data(), static_cast<uint32_t>(slice.entries.size()),
                               static_cast<uint32_t>(slice.units), shift};
    for (uint32_t i = 0; i < walk.units; ++i) {
      const auto unit = walk.locate(i);
      const auto tensor = static_cast<int64_t>(reinterpret_cast<uintptr_t>(unit.entry->param())) - 1;
      places.push_back({launch, tensor, unit.begin, unit.count});
    }
    ++launch;
  }
  return places;
}

int64_t norm_partials(const std::vector<Tensor>& tensors, double q) {
  const int shift = shift_of(tensors, kMostNormUnits, has_grad);
  int64_t units = 0;
  for (const Tensor& t : tensors) units += has_grad(t) ? units_of(t.numel, shift) : 0;
  return q == 2.0 ? units : 3 * units;
}

void norm(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AscentTerms>& groups, double q,
          double* partials, Norm* out) {
  const int shift = shift_of(tensors, kMostNormUnits, has_grad);
  const auto numbered = with_numbers(tensors);
  const auto slices = slices_of(numbered, groups, shift, capacity(target), has_grad);
  if (slices.empty()) return (on_host(target) ? interpreted::clear : device::clear)(target, out);
  using Pass = void (*)(const Target&, const Slice<AscentTerms>&, int, const NormTerms&);
  const auto run_pass = [&](Pass on_device, Pass interpret) {
    NormTerms terms{q, partials, out, 0, 0, 0, false};
    for (const auto& slice : slices) terms.total += static_cast<uint32_t>(slice.units);
    for (const auto& slice : slices) {
      terms.last = &slice == &slices.back();
      (on_host(target) ? interpret : on_device)(target, slice, shift, terms);
      terms.first_partial += static_cast<uint32_t>(slice.units);
    }
  };
  if (q == 2.0) return run_pass(device::norm, interpreted::norm);
  run_pass(device::peak, interpreted::peak);
  if (!std::isinf(q)) run_pass(device::powers, interpreted::powers);
}

void perturb(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AscentTerms>& groups, double q,
             const Norm* norm) {
  const PerturbTerms terms{q, norm};
  if (q == 1.0 || q == 2.0) {
    run(target, tensors, groups, terms, device::perturb, interpreted::perturb, has_grad);
  } else {
    run(target, with_numbers(tensors), groups, terms, device::power_perturb, interpreted::power_perturb, has_grad);
  }
}

void restore(const Target& target, const std::vector<Tensor>& tensors) {
  std::vector<Tensor> moved = tensors;
  for (Tensor& t : moved) {
    t.grad = nullptr;
    t.group = 0;
  }
  run(target, moved, std::vector<SgdTerms>(1), UpdateTerms{}, device::sgd_update, interpreted::sgd_update,
      [](const Tensor& t) { return t.backup != nullptr; });
}

void restore_accumulate(const Target& target, const std::vector<Tensor>& tensors,
                        const std::vector<MeanTerms>& groups) {
  run(target, tensors, groups, MeanUnits{}, device::accumulate, interpreted::accumulate, moves);
}

void sgd_update(const Target& target, const std::vector<Tensor>& tensors, const std::vector<SgdTerms>& groups,
                const float* grad_scale, const float* found_inf) {
  run(target, tensors, groups, UpdateTerms{grad_scale, found_inf}, device::sgd_update, interpreted::sgd_update, moves);
}

void adam_update(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AdamTerms>& groups,
                 const float* grad_scale, const float* found_inf) {
  run(target, tensors, groups, UpdateTerms{grad_scale, found_inf}, device::adam_update, interpreted::adam_update,
      moves);
}

}  // namespace fused_sam::cuda
