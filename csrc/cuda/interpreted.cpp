// The kernels lane by lane on host memory, with the same slices, units and sums.
#include <cmath>
#include <memory>

#include "ops.h"
#include "unit_powers.h"

namespace fused_sam::cuda::interpreted {
namespace {

// Calls visit(unit, group) for every unit, through arguments of the size a device would get.
template <int kBytes, class Group, class Visit>
void visit_units(const Slice<Group>& slice, int shift, const Visit& visit) {
  const auto arguments = std::make_unique<Arguments<Group, kBytes>>();
  slice.fill(arguments.get(), shift);
  for (uint32_t i = 0; i < arguments->units; ++i) {
    const auto unit = arguments->walk().locate(i);
    visit(i, unit, arguments->group(unit.entry->group()));
  }
}

template <class Group, class Visit>
void visit_units(const Slice<Group>& slice, int shift, const Visit& visit) {
  if (slice.bytes() <= kSmallPayload) {
    visit_units<kSmallPayload>(slice, shift, visit);
  } else {
    visit_units<kLargePayload>(slice, shift, visit);
  }
}

double add_partials(const NormTerms& terms) {
  double sums[kThreads] = {};
  for (uint32_t i = 0; i < terms.total; ++i) sums[i % kThreads] += terms.partials[i];
  return add_pairwise(sums, kThreads);
}

}  // namespace

size_t capacity() {
  return kLargePayload;
}

void norm(const Target&, const Slice<AscentTerms>& slice, int shift, const NormTerms& terms) {
  visit_units(slice, shift, [&](uint32_t i, const Unit<SlimEntry>& unit, const AscentTerms& group) {
    double sums[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) sums[lane] = norm_unit(unit, group.group, lane);
    terms.partials[terms.first_partial + i] = add_pairwise(sums, kWarp);
  });
  if (terms.last) *terms.out = {std::sqrt(add_partials(terms)), -1.0, -1.0};
}

void peak(const Target&, const Slice<AscentTerms>& slice, int shift, const NormTerms& terms) {
  auto* partials = reinterpret_cast<PeakPartial*>(terms.partials);
  const auto raise = [](PeakPartial* highest, const PeakPartial& other) {
    if (highest->is_below(other)) *highest = other;
  };
  visit_units(slice, shift, [&](uint32_t i, const Unit<SlimEntry>& unit, const AscentTerms& group) {
    PeakPartial highest{0.0, -1.0, -1.0};
    for (int lane = 0; lane < kWarp; ++lane) {
      const Peak peak = peak_unit(unit, group.group, lane);
      raise(&highest, {peak.value, static_cast<double>(tensor_number(*unit.entry)), static_cast<double>(peak.element)});
    }
    partials[terms.first_partial + i] = highest;
  });
  if (!terms.last) return;
  PeakPartial highest{0.0, -1.0, -1.0};
  for (uint32_t i = 0; i < terms.total; ++i) raise(&highest, partials[i]);
  *terms.out = {highest.value, highest.tensor, highest.element};
}

void powers(const Target&, const Slice<AscentTerms>& slice, int shift, const NormTerms& terms) {
  const double scale = terms.out->value;
  visit_units(slice, shift, [&](uint32_t i, const Unit<SlimEntry>& unit, const AscentTerms& group) {
    double sums[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) sums[lane] = powers_unit(unit, group.group, terms.q, scale, lane);
    terms.partials[terms.first_partial + i] = add_pairwise(sums, kWarp);
  });
  if (terms.last) *terms.out = norm_of_powers(scale, add_partials(terms), terms.q);
}

void clear(const Target&, Norm* out) {
  *out = Norm{};
}

void perturb(const Target&, const Slice<AscentTerms>& slice, int shift, const PerturbTerms& terms) {
  const double norm = terms.q == 1.0 ? 0.0 : terms.norm->value;
  visit_units(slice, shift, [&](uint32_t, const Unit<SlimEntry>& unit, const AscentTerms& group) {
    for (int lane = 0; lane < kWarp; ++lane) perturb_unit(unit, group, terms.q, norm, lane);
  });
}

void power_perturb(const Target&, const Slice<AscentTerms>& slice, int shift, const PerturbTerms& terms) {
  visit_units(slice, shift, [&](uint32_t, const Unit<SlimEntry>& unit, const AscentTerms& group) {
    for (int lane = 0; lane < kWarp; ++lane) power_perturb_unit(unit, group, terms.q, *terms.norm, lane);
  });
}

void accumulate(const Target&, const Slice<MeanTerms>& slice, int shift, const MeanUnits&) {
  visit_units(slice, shift, [&](uint32_t, const Unit<SlimEntry>& unit, const MeanTerms& group) {
    for (int lane = 0; lane < kWarp; ++lane) accumulate_unit(unit, group, lane);
  });
}

void sgd_update(const Target&, const Slice<SgdTerms>& slice, int shift, const UpdateTerms& terms) {
  visit_units(slice, shift, [&](uint32_t, const Unit<SlimEntry>& unit, const SgdTerms& group) {
    for (int lane = 0; lane < kWarp; ++lane) sgd_unit(unit, group, terms.multiplier(), terms.skip(), lane);
  });
}

void adam_update(const Target&, const Slice<AdamTerms>& slice, int shift, const UpdateTerms& terms) {
  visit_units(slice, shift, [&](uint32_t, const Unit<WideEntry>& unit, const AdamTerms& group) {
    for (int lane = 0; lane < kWarp; ++lane) adam_unit(unit, group, terms.multiplier(), terms.skip(), lane);
  });
}

}  // namespace fused_sam::cuda::interpreted
