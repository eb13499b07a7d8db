#include "powers.h"

#include "../arithmetic.h"

namespace fused_sam::cpu {
namespace {

// Calls visit(w, g, index) for every element, with both as fp64.
template <class Visit>
void for_each_element(const Tensor& t, int64_t begin, int64_t count, const Visit& visit) {
  dispatch(t.dtype, t.grad_dtype, [&](auto p, auto q) {
    const auto* w = static_cast<const decltype(p)*>(t.param) + begin;
    const auto* g = static_cast<const decltype(q)*>(t.grad) + begin;
    for (int64_t i = 0; i < count; ++i) {
      visit(static_cast<double>(widen(w[i])), static_cast<double>(widen(g[i])), begin + i);
    }
  });
}

}  // namespace

Peak peak(const Tensor& t, int64_t begin, int64_t count, const AscentGroup& group) {
  Peak result;
  for_each_element(t, begin, count, [&](double w, double g, int64_t i) { result.add(scaled(w, g, group), i); });
  return result;
}

double sum_of_powers(const Tensor& t, int64_t begin, int64_t count, const AscentGroup& group, double q, double scale) {
  double sum = 0.0, lost = 0.0;  // Kahan's sum: e is a power of the norm, in which an error grows
  for_each_element(t, begin, count, [&](double w, double g, int64_t) {
    const double term = power_of(scaled(w, g, group), scale, q) - lost;
    const double next = sum + term;
    lost = (next - sum) - term;
    sum = next;
  });
  return sum;
}

void power_perturb(const Tensor& t, int64_t begin, int64_t count, const AscentGroup& group, double q, double norm,
                   int64_t element) {
  dispatch(t.dtype, t.grad_dtype, t.rounded_dtype, [&](auto p, auto g, auto m) {
    using P = decltype(p);
    using Out = RoundedOr<P, decltype(m)>;
    constexpr bool kHasRounded = std::is_same<Out, decltype(m)>::value;
    auto* w = static_cast<P*>(t.param);
    auto* backup = static_cast<P*>(t.backup);
    auto* target = static_cast<Out*>(kHasRounded ? t.rounded : t.param);
    const auto* gradient = static_cast<const decltype(g)*>(t.grad);
    for (int64_t i = begin; i < begin + count; ++i) {
      const P old = w[i];
      const double x = widen(gradient[i]);  // before the backup is written: it may be the same memory
      if (!kHasRounded) backup[i] = old;
      if (std::isinf(q)) {
        if (i == element) store_rounded(&target[i], peak_displaced(widen(old), x, group, group.rho));
      } else {
        store_rounded(&target[i], displaced(widen(old), x, group, group.rho, q, norm));
      }
    }
  });
}

}  // namespace fused_sam::cpu
