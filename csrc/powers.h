// General p, in fp64 and one element at a time: pow costs more than memory, so nothing is gained by vectors. Shared by
// CPU and CUDA kernels.
#pragma once

#include <algorithm>
#include <cmath>

#include "convert.h"
#include "kernels.h"

namespace fused_sam {

FUSED_SAM_HD float widen(float x) {
  return x;
}
FUSED_SAM_HD double widen(double x) {
  return x;
}
FUSED_SAM_HD float widen(bf16 x) {
  return to_float(x);
}
FUSED_SAM_HD float widen(f16 x) {
  return to_float(x);
}
FUSED_SAM_HD void narrow(float* p, float x) {
  *p = x;
}
FUSED_SAM_HD void narrow(double* p, double x) {
  *p = x;
}
FUSED_SAM_HD void narrow(bf16* p, float x) {
  from_float(p, x);
}
FUSED_SAM_HD void narrow(f16* p, float x) {
  from_float(p, x);
}

// T, by which both the gradient and the displacement are scaled.
FUSED_SAM_HD double neighbourhood(double w, const AscentGroup& group) {
  return group.adaptive ? ::fabs(w) + group.eta : 1.0;
}

// x = T (g + decay * w) of one element, whose q-norm is taken.
struct WeightedGradient {
  bool adaptive, decays;
  double eta, decay;

  FUSED_SAM_HD double operator()(double w, double g) const {
    const double x = decays ? ::fma(decay, w, g) : g;
    return adaptive ? (::fabs(w) + eta) * x : x;
  }
};

FUSED_SAM_HD double scaled(double w, double g, const AscentGroup& group) {
  return WeightedGradient{group.adaptive, group.decay != 0.0, group.eta, group.decay}(w, g);
}

// What the 2-norm is to be taken again in units of, where squares have left the range of fp64; else 0. A power of two:
// nothing but the range changes.
FUSED_SAM_HD double far_scale(double norm) {
  if (norm > 1.7976931348623157e308) return 0x1p600;
  return norm < 0x1p-480 ? 0x1p-600 : 0.0;
}

// Whether a list holds gradients that can take a norm there.
inline bool holds_f64(const Tensor* tensors, size_t count) {
  return std::any_of(tensors, tensors + count, [](const Tensor& t) { return t.grad_dtype == DType::f64; });
}

// (|x| / scale)^q of an element of x. The scale is the largest |x|, or that of a norm far out: no q overflows.
FUSED_SAM_HD double power_of(double x, double scale, double q) {
  return ::pow(::fabs(x) / scale, q);
}

// w + e for finite q > 1. `norm` is positive and finite.
FUSED_SAM_HD double displaced(double w, double g, const AscentGroup& group, double rho, double q, double norm) {
  const double x = scaled(w, g, group);
  const double most = ::copysign(1.0, x) * (rho * neighbourhood(w, group));  // as one number, over a call of pow
  return w + most * ::pow(::fabs(x) / norm, q - 1.0);
}

// w + e for infinite q, at the one element that moves: by all of rho, in the direction of x.
FUSED_SAM_HD double peak_displaced(double w, double g, const AscentGroup& group, double rho) {
  return w + ::copysign(1.0, scaled(w, g, group)) * (rho * neighbourhood(w, group));
}

// Stores a result of fp64 arithmetic.
template <class T>
FUSED_SAM_HD void store_rounded(T* p, double x) {
  narrow(p, static_cast<decltype(widen(T{}))>(x));
}

// The largest |x| seen, and where; NaN once seen stays.
struct Peak {
  double value = 0.0;
  int64_t element = -1;

  FUSED_SAM_HD bool is_below(double size) const { return size > value || (size != size && value == value); }

  FUSED_SAM_HD void add(double x, int64_t at) {
    if (is_below(::fabs(x))) {
      value = ::fabs(x);
      element = at;
    }
  }
};

}  // namespace fused_sam
