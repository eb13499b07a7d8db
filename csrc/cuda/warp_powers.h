// What a lane does to its share of a unit for general p. Entries of an ascent carry the tensor's number in the list
// where those of an update have the momentum buffer.
#pragma once

#include "warp_types.h"

namespace fused_sam::cuda {

FUSED_SAM_HD int64_t tensor_number(const SlimEntry& entry) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(entry.state(0)));
}

// Calls visit(w, g, i) for this lane's elements, with both as fp64 and i counted from the tensor's first.
template <class Visit>
FUSED_SAM_HD void for_each_element(const Unit<SlimEntry>& u, int lane, const Visit& visit) {
  dispatch(u.entry->dtype(), u.entry->grad_dtype(), [&](auto p, auto q) {
    const auto* w = static_cast<const decltype(p)*>(u.entry->param());
    const auto* g = static_cast<const decltype(q)*>(u.entry->grad());
    FUSED_SAM_ROLLED
    for (int64_t i = u.begin + lane; i < u.begin + u.count; i += kWarp) {
      visit(static_cast<double>(widen(w[i])), static_cast<double>(widen(g[i])), i);
    }
  });
}

// The largest |x| of a unit, a block or all, and where it is.
struct PeakPartial {
  double value = 0.0, tensor = -1.0, element = -1.0;

  // Of equal ones the first in the list stays.
  FUSED_SAM_HD void raise(const PeakPartial& other) {
    const bool equal = other.value == value || (other.value != other.value && value != value);
    const bool before = other.element >= 0 &&
                        (element < 0 || other.tensor < tensor || (other.tensor == tensor && other.element < element));
    if (Peak{value, 0}.is_below(other.value) || (equal && before)) *this = other;
  }
};

// That of one lane. A unit without a gradient is what is left of a block.
FUSED_SAM_HD PeakPartial peak_unit(const Unit<SlimEntry>& u, const AscentGroup& group, int lane) {
  if (u.entry->grad() == nullptr) return {};
  Peak result;
  for_each_element(u, lane, [&](double w, double g, int64_t i) { result.add(scaled(w, g, group), i); });
  return {result.value, static_cast<double>(tensor_number(*u.entry)), static_cast<double>(result.element)};
}

FUSED_SAM_HD double powers_unit(const Unit<SlimEntry>& u, const AscentGroup& group, double q, double scale, int lane) {
  double sum = 0.0;
  if (u.entry->grad() == nullptr) return sum;
  for_each_element(u, lane, [&](double w, double g, int64_t) { sum += power_of(scaled(w, g, group), scale, q); });
  return sum;
}

FUSED_SAM_HD void power_perturb_unit(const Unit<SlimEntry>& u, const AscentTerms& terms, double q, const Norm& norm,
                                     int lane) {
  const double rho = terms.rho.read();
  const bool active = ascent_scalars(rho, terms.group, q, norm.value, true).active;
  const bool infinite = q > 1.7976931348623157e308;
  const bool here = infinite && static_cast<double>(tensor_number(*u.entry)) == norm.tensor;
  const int64_t element = here ? static_cast<int64_t>(norm.element) - u.begin : -1;
  dispatch(u.entry->dtype(), u.entry->grad_dtype(), u.entry->rounded_dtype(), [&](auto p, auto g, auto m) {
    using P = decltype(p);
    using Out = RoundedOr<P, decltype(m)>;
    constexpr bool kHasRounded = std::is_same<Out, decltype(m)>::value;
    P* w = static_cast<P*>(u.entry->param()) + u.begin;
    Out* target = static_cast<Out*>(kHasRounded ? u.entry->rounded() : u.entry->param()) + u.begin;
    P* backup = kHasRounded ? nullptr : static_cast<P*>(u.entry->backup()) + u.begin;
    const auto* gradient = static_cast<const decltype(g)*>(u.entry->grad()) + u.begin;
    FUSED_SAM_ROLLED
    for (int i = lane; i < static_cast<int>(u.count); i += kWarp) {
      const P old = w[i];
      const double x = widen(gradient[i]);  // before the backup is written: it may be the same memory
      if (!kHasRounded) backup[i] = old;
      if (!active || (infinite && i != element)) continue;
      store_rounded(&target[i], infinite ? peak_displaced(widen(old), x, terms.group, rho)
                                         : displaced(widen(old), x, terms.group, rho, q, norm.value));
    }
  });
}

// From the sum of x^2: the norm, or what the pass over powers that follows has to know.
FUSED_SAM_HD Norm norm_of_squares(double sum, bool again) {
  const double norm = ::sqrt(sum), scale = again ? far_scale(norm) : 0.0;
  return scale > 0.0 ? Norm{scale, 0.0, -1.0} : Norm{norm, -1.0, -1.0};
}

// From the largest |x|, or another scale, and the sum of (|x| / scale)^q. A largest that is zero or not finite is the
// norm itself.
FUSED_SAM_HD Norm norm_of_powers(double scale, double sum, double q) {
  const bool usable = scale > 0.0 && scale <= 1.7976931348623157e308;
  return {usable ? scale * ::pow(sum, 1.0 / q) : scale, -1.0, -1.0};
}

}  // namespace fused_sam::cuda
