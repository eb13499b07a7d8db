#include "launch.h"

#include "ops.h"

namespace fused_sam::cuda {
namespace {

bool has_grad(const Tensor& t) {
  return t.grad != nullptr;
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

int64_t norm_partials(const std::vector<Tensor>& tensors) {
  const int shift = shift_of(tensors, kMostNormUnits, has_grad);
  int64_t units = 0;
  for (const Tensor& t : tensors) units += has_grad(t) ? units_of(t.numel, shift) : 0;
  return units;
}

void norm(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AscentTerms>& groups,
          double* partials, double* out) {
  const int shift = shift_of(tensors, kMostNormUnits, has_grad);
  const auto slices = slices_of(tensors, groups, shift, capacity(target), has_grad);
  if (slices.empty()) return (on_host(target) ? interpreted::clear : device::clear)(target, out);
  NormTerms terms{partials, out, 0, 0, 0, false};
  for (const auto& slice : slices) terms.total += static_cast<uint32_t>(slice.units);
  for (const auto& slice : slices) {
    terms.last = &slice == &slices.back();
    (on_host(target) ? interpreted::norm : device::norm)(target, slice, shift, terms);
    terms.first_partial += static_cast<uint32_t>(slice.units);
  }
}

void perturb(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AscentTerms>& groups,
             const double* norm) {
  run(target, tensors, groups, PerturbTerms{norm}, device::perturb, interpreted::perturb, has_grad);
}

void restore(const Target& target, const std::vector<Tensor>& tensors) {
  std::vector<Tensor> moved = tensors;
  for (Tensor& t : moved) {
    t.grad = nullptr;
    t.group = 0;
  }
  run(target, moved, std::vector<SgdTerms>(1), SgdUpdateTerms{}, device::sgd_update, interpreted::sgd_update,
      [](const Tensor& t) { return t.backup != nullptr; });
}

void sgd_update(const Target& target, const std::vector<Tensor>& tensors, const std::vector<SgdTerms>& groups,
                const float* grad_scale, const float* found_inf) {
  run(target, tensors, groups, SgdUpdateTerms{grad_scale, found_inf}, device::sgd_update, interpreted::sgd_update,
      [](const Tensor& t) { return t.grad != nullptr || t.backup != nullptr; });
}

}  // namespace fused_sam::cuda
