// The kernels lane by lane on host memory, with the same launches, units and sums.
#include <atomic>
#include <cmath>
#include <cstddef>
#include <memory>
#include <stdexcept>

#include "targets.h"
#include "warp_accumulate.h"
#include "warp_ascent.h"
#include "warp_powers.h"

namespace fused_sam::cuda {
namespace {

std::atomic<int64_t> good_launches{-1};  // before one that fails; negative: all are good

void count_launch() {
  if (good_launches >= 0 && good_launches-- == 0)
    throw std::runtime_error("CUDA error on the host, as it was asked for.");
}

// Calls visit(number, unit, group) for every unit, through arguments of the size that a device would get.
template <int kBytes, class Group, class Visit>
void visit_units_as(const WorkList<Group>& list, const Visit& visit) {
  using Given = Arguments<Group, kBytes>;
  const auto arguments = std::make_unique<Given>();
  std::memcpy(arguments.get(), &list.arguments(), offsetof(Given, payload) + list.bytes());
  for (uint32_t i = 0; i < arguments->units; ++i) {
    const auto unit = arguments->walk().locate(i);
    visit(i, unit, arguments->group(unit.entry->group()));
  }
}

template <class Group, class Visit>
void visit_units(const WorkList<Group>& list, const Visit& visit) {
  count_launch();
  if (list.bytes() <= kSmallPayload) {
    visit_units_as<kSmallPayload>(list, visit);
  } else if (list.bytes() <= kMediumPayload) {
    visit_units_as<kMediumPayload>(list, visit);
  } else {
    visit_units_as<kLargePayload>(list, visit);
  }
}

// Leaves the sums of blocks and adds them up after the last; `sum(unit, group, lane)` is one lane's part.
template <class Sum>
double add_blocks(const WorkList<AscentTerms>& list, const NormTerms& terms, const Sum& sum) {
  double warps[kUnitsPerBlock] = {};
  visit_units(list, [&](uint32_t i, const Unit<SlimEntry>& unit, const AscentTerms& group) {
    double lanes[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = sum(unit, group.group, lane);
    warps[i % kUnitsPerBlock] = add_pairwise(lanes, kWarp);
    if (i % kUnitsPerBlock + 1 != kUnitsPerBlock && i + 1 != list.arguments().units) return;
    terms.partials[terms.first_block + i / kUnitsPerBlock] = add_pairwise(warps, kUnitsPerBlock);
    for (double& warp : warps) warp = 0.0;
  });
  double sums[kThreads] = {};
  for (uint32_t i = 0; terms.last && i < terms.blocks; ++i) sums[i % kThreads] += terms.partials[i];
  return add_pairwise(sums, kThreads);
}

size_t capacity() {
  return kLargePayload;
}

void norm(const Target&, const WorkList<AscentTerms>& list, const NormTerms& terms) {
  const double sum =
      with_types(list.types(), [&](auto types) { return add_blocks(list, terms, norm_unit<decltype(types)>); });
  if (terms.last) *terms.out = norm_of_squares(sum, terms.again);
}

void peak(const Target&, const WorkList<AscentTerms>& list, const NormTerms& terms) {
  auto* partials = reinterpret_cast<PeakPartial*>(terms.partials);
  PeakPartial highest;
  visit_units(list, [&](uint32_t i, const Unit<SlimEntry>& unit, const AscentTerms& group) {
    if (i % kUnitsPerBlock == 0) highest = {};
    for (int lane = 0; lane < kWarp; ++lane) highest.raise(peak_unit(unit, group.group, lane));
    partials[terms.first_block + i / kUnitsPerBlock] = highest;
  });
  if (!terms.last) return;
  highest = {};
  for (uint32_t i = 0; i < terms.blocks; ++i) highest.raise(partials[i]);
  *terms.out = {highest.value, highest.tensor, highest.element};
}

void powers(const Target&, const WorkList<AscentTerms>& list, const NormTerms& terms) {
  if (terms.out->tensor < 0.0) return;
  const double scale = terms.out->value;
  const double sum = add_blocks(list, terms, [&](const Unit<SlimEntry>& unit, const AscentGroup& group, int lane) {
    return powers_unit(unit, group, terms.q, scale, lane);
  });
  if (terms.last) *terms.out = norm_of_powers(scale, sum, terms.q);
}

void clear(const Target&, Norm* out) {
  *out = Norm{};
}

// Calls work(types, unit, group, lane) for every lane of every unit, with the dtypes that a device's kernel would have.
template <class Group, class Work>
void visit_lanes(const WorkList<Group>& list, const Work& work) {
  with_types(list.types(), [&](auto types) {
    visit_units(list, [&](uint32_t, const auto& unit, const Group& group) {
      for (int lane = 0; lane < kWarp; ++lane) work(types, unit, group, lane);
    });
  });
}

void perturb(const Target&, const WorkList<AscentTerms>& list, const PerturbTerms& terms) {
  const bool powers = terms.q != 1.0 && terms.q != 2.0;
  visit_lanes(list, [&](auto types, const auto& unit, const AscentTerms& group, int lane) {
    if (powers) {
      power_perturb_unit(unit, group, terms.q, *terms.norm, lane);
    } else {
      perturb_unit<decltype(types)>(unit, group, terms.q, terms.q == 1.0 ? 0.0 : terms.norm->value, lane);
    }
  });
}

void accumulate(const Target&, const WorkList<AccumulateTerms>& list, const AccumulateUnits&) {
  visit_lanes(list, [&](auto types, const auto& unit, const AccumulateTerms& group, int lane) {
    accumulate_unit<decltype(types)>(unit, group, lane);
  });
}

void sgd_update(const Target&, const WorkList<SgdTerms>& list, const UpdateTerms& terms) {
  visit_lanes(list, [&](auto types, const auto& unit, const SgdTerms& group, int lane) {
    sgd_unit<decltype(types)>(unit, group, terms.multiplier(), terms.skip(), lane);
  });
}

void adam_update(const Target&, const WorkList<AdamTerms>& list, const UpdateTerms& terms) {
  visit_lanes(list, [&](auto types, const auto& unit, const AdamTerms& group, int lane) {
    adam_unit<decltype(types)>(unit, group, terms.multiplier(), terms.skip(), lane);
  });
}

}  // namespace

void fail_on_host(int64_t good) {
  good_launches = good;
}

const Ops& host_ops() {
  static const Ops ops{capacity, norm, peak, powers, clear, perturb, accumulate, sgd_update, adam_update};
  return ops;
}

}  // namespace fused_sam::cuda
