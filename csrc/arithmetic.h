// The arithmetic of one element, shared by all kernels: a CPU vector and a CUDA thread differ in `Vec` alone. Every
// product and every fused multiply-add is written out, so that no compiler decides where to round.
#pragma once

#include <math.h>

#include <type_traits>

#include "kernels.h"

namespace fused_sam {

// The type a tensor's elements are computed in.
template <class T>
struct Computed {
  using type = float;
};
template <>
struct Computed<double> {
  using type = double;
};

// Calls f(P{}, G{}) with the storage types of a parameter and its gradient, which can_mix.
template <class F>
FUSED_SAM_HD void dispatch(DType param, DType grad, const F& f) {
  if (param == DType::f64) {
    f(double{}, double{});
  } else if (param == DType::f32) {
    if (grad == DType::f32) f(float{}, float{});
    if (grad == DType::bf16) f(float{}, bf16{});
    if (grad == DType::f16) f(float{}, f16{});
  } else if (param == DType::bf16) {
    if (grad == DType::f32) f(bf16{}, float{});
    if (grad == DType::bf16) f(bf16{}, bf16{});
  } else {
    if (grad == DType::f32) f(f16{}, float{});
    if (grad == DType::f16) f(f16{}, f16{});
  }
}

// Stands for the storage type of the rounded copy where there is none.
struct NoRounded {};

// The storage type of what the network computes with.
template <class P, class M>
using RoundedOr = typename std::conditional<std::is_same<M, NoRounded>::value, P, M>::type;

// Calls f(P{}, G{}, M{}) with that of the rounded copy, too.
template <class F>
FUSED_SAM_HD void dispatch(DType param, DType grad, DType rounded, const F& f) {
  if (rounded == DType::bf16) {
    if (grad == DType::f32) f(float{}, float{}, bf16{});
    if (grad == DType::bf16) f(float{}, bf16{}, bf16{});
  } else if (rounded == DType::f16) {
    if (grad == DType::f32) f(float{}, float{}, f16{});
    if (grad == DType::f16) f(float{}, f16{}, f16{});
  } else {
    dispatch(param, grad, [&](auto p, auto g) { f(p, g, NoRounded{}); });
  }
}

// With d = g + decay * w: e = post * (pre * d), or t * (post * (t * (pre * d))) with t = |w| + eta when adaptive. pre
// is a power of two that keeps `post` in the range of fp32 where rho / norm itself is not (norms near the smallest or
// largest number). With `sign` (p = inf) e = post * sign(d), or t * post * sign(d).
struct AscentScalars {
  double pre, post, eta, decay;
  bool adaptive, sign;
  bool active;  // false: e = 0, only the backup is written
};

FUSED_SAM_HD AscentScalars ascent_scalars(double rho, const AscentGroup& group, double q, double norm, bool is_double) {
  if (q == 1.0) return {1.0, rho, group.eta, group.decay, group.adaptive, true, rho != 0.0};
  const double largest = 1.7976931348623157e308;
  const double scale = rho / norm;
  const bool active = rho != 0.0 && norm > 0.0 && norm <= largest;
  AscentScalars s{1.0, scale, group.eta, group.decay, group.adaptive, false, active};
  const double limit = is_double ? 0x1p900 : 0x1p100;
  const double size = ::fabs(scale);  // rho < 0 leads the other way
  if (size > limit || size < 1.0 / limit) {
    const double shift = is_double ? 0x1p512 : 0x1p64;
    s.pre = size > 1.0 ? shift : 1.0 / shift;
    // rho / norm overflows in fp64 when the norm is subnormal, so the norm is scaled, not the quotient.
    s.post = rho / (norm * s.pre);
  }
  return s;
}

template <class Vec>
struct AscentMath {
  Vec pre, post, eta, decay;
  bool adaptive, sign, decays;

  static FUSED_SAM_HD Vec set(double x) { return Vec::set(static_cast<typename Vec::Scalar>(x)); }

  FUSED_SAM_HD explicit AscentMath(const AscentScalars& s)
      : pre(set(s.pre)),
        post(set(s.post)),
        eta(set(s.eta)),
        decay(set(s.decay)),
        adaptive(s.adaptive),
        sign(s.sign),
        decays(s.decay != 0.0) {}

  // w + e
  FUSED_SAM_HD Vec operator()(Vec w, Vec g) const {
    const Vec t = add(magnitude(w), eta);
    if (decays) g = fma(w, decay, g);
    if (sign) {
      const Vec step = with_sign(post, g);
      return adaptive ? fma(t, step, w) : add(w, step);
    }
    g = mul(g, pre);
    return adaptive ? fma(t, mul(mul(t, g), post), w) : fma(g, post, w);
  }
};

// The operations of torch.optim.SGD's for-loop, in its order: `x.add(y, alpha=a)` is fma(y, a, x) there.
template <class Vec>
struct SgdMath {
  Vec multiplier, sign, weight_decay, momentum, undamped, minus_lr;
  bool scaled, decays, has_momentum, first, nesterov;

  static FUSED_SAM_HD Vec set(double x) { return Vec::set(static_cast<typename Vec::Scalar>(x)); }

  FUSED_SAM_HD SgdMath(const SgdGroup& group, double grad_multiplier)
      : multiplier(set(grad_multiplier)),
        sign(set(group.maximize ? -1.0 : 1.0)),
        weight_decay(set(group.weight_decay)),
        momentum(set(group.momentum)),
        undamped(set(1.0 - group.dampening)),
        minus_lr(set(-group.lr)),
        scaled(grad_multiplier != 1.0),
        decays(group.weight_decay != 0.0),
        has_momentum(group.momentum != 0.0),
        first(group.first),
        nesterov(group.nesterov) {}

  FUSED_SAM_HD bool reads_buffer() const { return has_momentum && !first; }

  // The new w. `g` comes out unscaled where it came in scaled, `m` as the new buffer where there is momentum.
  FUSED_SAM_HD Vec operator()(Vec w, Vec* g, Vec* m) const {
    if (scaled) *g = mul(*g, multiplier);
    Vec d = mul(*g, sign);
    if (decays) d = fma(w, weight_decay, d);
    if (has_momentum) {
      *m = first ? d : fma(d, undamped, mul(*m, momentum));
      d = nesterov ? fma(*m, momentum, d) : *m;
    }
    return fma(d, minus_lr, w);
  }
};

// x + a (y - x) as torch's `x.lerp(y, a)` rounds it: fma(a, y - x, x) for a < 1/2 and fma(a - 1, y - x, y) beyond. Of
// equal x and y it is theirs.
template <class Vec>
struct Lerp {
  using S = typename Vec::Scalar;
  Vec weight;
  bool near;

  FUSED_SAM_HD explicit Lerp(double a) : weight(Vec::set(static_cast<S>(a))), near(static_cast<S>(a) < S(0.5)) {
    if (!near) weight = Vec::set(static_cast<S>(a) - S(1));
  }
  FUSED_SAM_HD Vec operator()(Vec x, Vec y) const { return fma(weight, sub(y, x), near ? x : y); }
};

// A running mean of gradients.
template <class Vec>
struct AccumulateMath {
  Lerp<Vec> lerp;
  Vec weight;
  bool first;

  FUSED_SAM_HD explicit AccumulateMath(const AccumulateGroup& group)
      : lerp(group.weight), weight(Vec::set(static_cast<typename Vec::Scalar>(group.weight))), first(group.first) {}

  FUSED_SAM_HD Vec operator()(Vec mean, Vec g) const { return first ? mul(g, weight) : lerp(mean, g); }
};

// What of a step of Adam depends on more than one hyperparameter.
struct AdamScalars {
  AdamGroup group;
  double step_size, decay, correction2_root;  // decay: what decoupled weight decay multiplies w by
};

// `step` is read where the group does not hold the corrections of its step.
FUSED_SAM_HD AdamScalars adam_scalars(const AdamGroup& group, double lr, const float* step) {
  double correction1 = group.correction1, correction2_root = group.correction2_root;
  if (correction1 == 0.0 && step != nullptr) {
    const double t = static_cast<double>(*step) + 1.0;
    correction1 = 1.0 - ::pow(group.beta1, t);
    correction2_root = ::sqrt(1.0 - ::pow(group.beta2, t));
  }
  return {group, lr / correction1, 1.0 - lr * group.weight_decay, correction2_root};
}

// The operations of torch.optim.Adam's for-loop, in its order. There `addcmul` is fma(a * y, z, x), and `addcdiv` is
// x + (a * y) / z.
template <class Vec>
struct AdamMath {
  using S = typename Vec::Scalar;
  Vec multiplier, sign, weight_decay, decay, beta2, weight2, correction2_root, eps, minus_step_size;
  Lerp<Vec> lerp;
  bool scaled, couples, decouples, amsgrad, first;

  static FUSED_SAM_HD Vec set(double x) { return Vec::set(static_cast<S>(x)); }

  FUSED_SAM_HD AdamMath(const AdamScalars& s, double grad_multiplier)
      : multiplier(set(grad_multiplier)),
        sign(set(s.group.maximize ? -1.0 : 1.0)),
        weight_decay(set(s.group.weight_decay)),
        decay(set(s.decay)),
        beta2(set(s.group.beta2)),
        weight2(set(1.0 - s.group.beta2)),
        correction2_root(set(s.correction2_root)),
        eps(set(s.group.eps)),
        minus_step_size(set(-s.step_size)),
        lerp(1.0 - s.group.beta1),
        scaled(grad_multiplier != 1.0),
        couples(s.group.weight_decay != 0.0 && !s.group.decoupled),
        decouples(s.group.weight_decay != 0.0 && s.group.decoupled),
        amsgrad(s.group.amsgrad),
        first(s.group.first) {}

  // The new w. `g` comes out unscaled where it came in scaled; `m`, `v` and, with amsgrad, `largest` as the new state.
  FUSED_SAM_HD Vec operator()(Vec w, Vec* g, Vec* m, Vec* v, Vec* largest) const {
    if (scaled) *g = mul(*g, multiplier);
    Vec d = mul(*g, sign);
    if (couples) d = fma(w, weight_decay, d);
    if (decouples) w = mul(w, decay);
    if (first) *m = *v = *largest = Vec::set(S(0));
    *m = lerp(*m, d);
    *v = fma(mul(weight2, d), d, mul(*v, beta2));
    if (amsgrad) *largest = larger(*largest, *v);
    const Vec denominator = add(div(root(amsgrad ? *largest : *v), correction2_root), eps);
    return add(w, div(mul(minus_step_size, *m), denominator));
  }
};

}  // namespace fused_sam
