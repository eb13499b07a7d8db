// General p: the largest |x|, the sum of powers scaled by it, and the perturbation by powers.
#include "last_block.cuh"
#include "unit_powers.h"

namespace fused_sam::cuda::device {
namespace {

__device__ PeakPartial highest_lane(PeakPartial peak) {
  for (int half = kWarp / 2; half > 0; half /= 2) {
    const PeakPartial other{__shfl_down_sync(0xffffffff, peak.value, half),
                            __shfl_down_sync(0xffffffff, peak.tensor, half),
                            __shfl_down_sync(0xffffffff, peak.element, half)};
    if (peak.is_below(other)) peak = other;
  }
  return peak;
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads)
    peak_kernel(const __grid_constant__ Arguments<AscentTerms, kBytes> arguments, const NormTerms terms) {
  const Place here = place(false);
  auto* partials = reinterpret_cast<PeakPartial*>(terms.partials);
  if (here.unit < arguments.units) {
    const auto unit = arguments.walk().locate(here.unit);
    const Peak peak = peak_unit(unit, arguments.group(unit.entry->group()).group, here.lane);
    const PeakPartial highest =
        highest_lane({peak.value, static_cast<double>(tensor_number(*unit.entry)), static_cast<double>(peak.element)});
    if (here.lane == 0) partials[terms.first_partial + here.unit] = highest;
  }
  if (!terms.last || !is_last_block(terms.ticket) || threadIdx.x >= kWarp) return;
  PeakPartial highest{0.0, -1.0, -1.0};
  for (uint32_t i = threadIdx.x; i < terms.total; i += kWarp) {
    const PeakPartial other{__ldcg(&partials[i].value), __ldcg(&partials[i].tensor), __ldcg(&partials[i].element)};
    if (highest.is_below(other)) highest = other;
  }
  highest = highest_lane(highest);
  if (threadIdx.x == 0) *terms.out = {highest.value, highest.tensor, highest.element};
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads)
    powers_kernel(const __grid_constant__ Arguments<AscentTerms, kBytes> arguments, const NormTerms terms) {
  const Place here = place(false);
  const double scale = terms.out->value;
  if (here.unit < arguments.units) {
    const auto unit = arguments.walk().locate(here.unit);
    const AscentGroup& group = arguments.group(unit.entry->group()).group;
    const double sum = add_lanes(powers_unit(unit, group, terms.q, scale, here.lane));
    if (here.lane == 0) terms.partials[terms.first_partial + here.unit] = sum;
  }
  if (!terms.last || !is_last_block(terms.ticket)) return;
  const double sum = add_partials(terms);
  if (threadIdx.x == 0) *terms.out = norm_of_powers(scale, sum, terms.q);
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads)
    power_perturb_kernel(const __grid_constant__ Arguments<AscentTerms, kBytes> arguments, const PerturbTerms terms) {
  const Place here = place(true);
  if (here.unit >= arguments.units) return;
  const auto unit = arguments.walk().locate(here.unit);
  power_perturb_unit(unit, arguments.group(unit.entry->group()), terms.q, *terms.norm, here.lane);
}

}  // namespace

void peak(const Target& target, const Slice<AscentTerms>& slice, int shift, const NormTerms& terms) {
  NormTerms with_ticket = terms;
  with_ticket.ticket = take_ticket(target);
  launch(peak_kernel<kSmallPayload>, peak_kernel<kMostPayload>, target, slice, shift, with_ticket, "norm");
}

void powers(const Target& target, const Slice<AscentTerms>& slice, int shift, const NormTerms& terms) {
  NormTerms with_ticket = terms;
  with_ticket.ticket = take_ticket(target);
  launch(powers_kernel<kSmallPayload>, powers_kernel<kMostPayload>, target, slice, shift, with_ticket, "norm");
}

void power_perturb(const Target& target, const Slice<AscentTerms>& slice, int shift, const PerturbTerms& terms) {
  launch(power_perturb_kernel<kSmallPayload>, power_perturb_kernel<kMostPayload>, target, slice, shift, terms,
         "perturb");
}

}  // namespace fused_sam::cuda::device
