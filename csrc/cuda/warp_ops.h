// What a lane does to its share of a unit. Plain functions: CUDA threads call them, and so does the interpreter that
// the tests use where there is no GPU.
#pragma once

#include "rounded_copy.h"

namespace fused_sam::cuda {

// A hyperparameter: a number, or where the device finds it.
struct Scalar {
  double number;
  const void* device;  // null: `number` holds
  DType dtype;

  FUSED_SAM_HD double read() const {
    if (device == nullptr) return number;
    switch (dtype) {
      case DType::f32: return *static_cast<const float*>(device);
      case DType::f64: return *static_cast<const double*>(device);
      case DType::bf16: return widen(*static_cast<const bf16*>(device));
      case DType::f16: return widen(*static_cast<const f16*>(device));
    }
    return number;
  }
};

struct AscentTerms {
  using Entry = SlimEntry;
  AscentGroup group;
  Scalar rho;  // instead of group.rho
};

struct SgdTerms {
  using Entry = SlimEntry;
  SgdGroup group;
  Scalar lr;  // instead of group.lr
};

struct AdamTerms {
  using Entry = WideEntry;
  AdamGroup group;
  Scalar lr;  // instead of group.lr
};

template <class T>
struct Pointed;
template <class T>
struct Pointed<T*> {
  using type = T;
};
template <class T>
using Pointee = typename Pointed<T>::type;

// The dtypes of a unit's tensor, as kernels know them: each kernel exists for lists of one kind, where they are
// constant, and as `AnyTypes` for lists of several. In the former, what is constant for a launch is tested outside of
// the loops.
template <class P, class G, class M = NoModel>
struct OneType {
  static constexpr bool kConstant = true;
  static constexpr size_t kSize = sizeof(P);
  template <class E, class F>
  static FUSED_SAM_HD void dispatch(const E&, const F& f) {
    f(P{}, G{}, M{});
  }
};

struct AnyTypes {
  static constexpr bool kConstant = false;
  template <class E, class F>
  static FUSED_SAM_HD void dispatch(const E& entry, const F& f) {
    fused_sam::dispatch(entry.dtype(), entry.grad_dtype(), entry.model_dtype(), f);
  }
};

// x = T (g + decay * w) of one element.
struct WeightedGradient {
  bool adaptive, decays;
  double eta, decay;

  FUSED_SAM_HD double operator()(double w, double g) const {
    const double x = decays ? ::fma(decay, w, g) : g;
    return adaptive ? (::fabs(w) + eta) * x : x;
  }
};

// This lane's part of the sum of squares of x, over elements that depend on the sizes alone. Without `kWeighted` x is
// g. Whether memory is aligned is decided outside of the loop: one that merges both kinds of loads waits for each.
template <class P, class G, bool kWeighted, bool kAligned>
FUSED_SAM_HD double sum_of_squares(const P* w, const G* g, const WeightedGradient& x_of, int count, int lane) {
  constexpr int V = kWeighted ? pack_width<P, G>() : pack_width<G>();
  constexpr int kUnroll = kWeighted ? 2 : 4;
  double sums[kUnroll] = {};
  const auto add = [&](int k, G gradient, P weight) {
    const double x = kWeighted ? x_of(widen(weight), widen(gradient)) : widen(gradient);
    sums[k] = ::fma(x, x, sums[k]);
  };
  const int packs = count / V;
  FUSED_SAM_ROLLED
  for (int j = lane; j < packs; j += kWarp * kUnroll) {
    Pack<G, V> gradients[kUnroll];
    Pack<P, V> weights[kUnroll];
    FUSED_SAM_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      const int i = (j + k * kWarp) * V;
      if (j + k * kWarp >= packs) break;
      gradients[k] = load_as<V, kAligned>(g + i);
      if (kWeighted) weights[k] = load_as<V, kAligned>(w + i);
    }
    FUSED_SAM_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      if (j + k * kWarp >= packs) break;
      for (int e = 0; e < V; ++e) add(k, gradients[k].v[e], kWeighted ? weights[k].v[e] : P{});
    }
  }
  const int i = packs * V + lane;
  if (i < count) add(0, g[i], kWeighted ? w[i] : P{});
  for (int half = kUnroll / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

template <class P, class G, bool kWeighted>
FUSED_SAM_HD double sum_of_squares(const P* w, const G* g, const WeightedGradient& x_of, int count, int lane) {
  constexpr int V = kWeighted ? pack_width<P, G>() : pack_width<G>();
  return misalignment<V>(g) == 0 && (!kWeighted || misalignment<V>(w) == 0)
             ? sum_of_squares<P, G, kWeighted, true>(w, g, x_of, count, lane)
             : sum_of_squares<P, G, kWeighted, false>(w, g, x_of, count, lane);
}

// backup <- w, target <- w + e. The target is w itself, or the model where w is a master copy, which is its own backup.
// backup may be grad: a lane reads its elements before it writes them.
template <class P, class G, class M>
struct Perturb {
  static constexpr int kUnroll = sizeof(P) == sizeof(G) ? 2 : 4;
  using T = ModelOr<P, M>;
  const P* w;
  const G* g;
  P* backup;
  T* target;
  AscentMath<Lane<typename Computed<P>::type>> math;

  template <int V>
  struct Regs {
    Pack<P, V> w;
    Pack<G, V> g;
  };
  template <int V>
  FUSED_SAM_HD Regs<V> load(int i) const {
    return {cuda::load<V>(w + i), cuda::load<V>(g + i)};
  }
  template <int V>
  FUSED_SAM_HD void finish(int i, const Regs<V>& regs) const {
    Pack<T, V> perturbed;
    for (int e = 0; e < V; ++e) narrow(&perturbed.v[e], math({widen(regs.w.v[e])}, {widen(regs.g.v[e])}).v);
    if constexpr (std::is_same<M, NoModel>::value) cuda::store<V>(backup + i, regs.w);
    cuda::store<V>(target + i, perturbed);
  }
};

// Restore and SGD step; m is null without momentum.
template <class P, class G, class M>
struct Sgd {
  static constexpr int kUnroll = 2;
  using Vec = Lane<typename Computed<P>::type>;
  P* w;
  const P* source;
  G* g;
  P* m;
  SgdMath<Vec> math;
  ModelStore<P, M> model;

  template <int V>
  struct Regs {
    Pack<P, V> w;
    Pack<G, V> g;
    Pack<P, V> m;
  };
  template <int V>
  FUSED_SAM_HD Regs<V> load(int i) const {
    Regs<V> regs;
    regs.w = cuda::load<V>(source + i);
    regs.g = cuda::load<V>(g + i);
    regs.m = Pack<P, V>{};  // not w: the load of m would wait for it
    if (math.reads_buffer()) regs.m = cuda::load<V>(m + i);
    return regs;
  }
  template <int V>
  FUSED_SAM_HD void finish(int i, Regs<V> regs) const {
    for (int e = 0; e < V; ++e) {
      Vec gradient{widen(regs.g.v[e])}, buffer{widen(regs.m.v[e])};
      narrow(&regs.w.v[e], math({widen(regs.w.v[e])}, &gradient, &buffer).v);
      narrow(&regs.g.v[e], gradient.v);
      narrow(&regs.m.v[e], buffer.v);
    }
    cuda::store<V>(w + i, regs.w);
    model.template store<V>(i, regs.w);
    if (math.scaled) cuda::store<V>(g + i, regs.g);
    if (math.has_momentum) cuda::store<V>(m + i, regs.m);
  }
};

// Restore and Adam step; u is another name for v without amsgrad, and not written then.
template <class P, class G, class M>
struct Adam {
  static constexpr int kUnroll = sizeof(P) == 2 ? 2 : 1;  // five tensors at a time fill the registers
  using Vec = Lane<typename Computed<P>::type>;
  P* w;
  const P* source;
  G* g;
  P *m, *v, *u;
  AdamMath<Vec> math;
  ModelStore<P, M> model;

  template <int V>
  struct Regs {
    Pack<P, V> w;
    Pack<G, V> g;
    Pack<P, V> m, v, u;
  };
  template <int V>
  FUSED_SAM_HD Regs<V> load(int i) const {
    Regs<V> regs;
    regs.w = cuda::load<V>(source + i);
    regs.g = cuda::load<V>(g + i);
    regs.m = regs.v = regs.u = Pack<P, V>{};  // not w: the loads would wait for it
    if (math.first) return regs;
    regs.m = cuda::load<V>(m + i);
    regs.v = cuda::load<V>(v + i);
    if (math.amsgrad) regs.u = cuda::load<V>(u + i);
    return regs;
  }
  template <int V>
  FUSED_SAM_HD void finish(int i, Regs<V> regs) const {
    for (int e = 0; e < V; ++e) {
      Vec gradient{widen(regs.g.v[e])}, mean{widen(regs.m.v[e])}, square{widen(regs.v.v[e])},
          largest{widen(regs.u.v[e])};
      narrow(&regs.w.v[e], math({widen(regs.w.v[e])}, &gradient, &mean, &square, &largest).v);
      narrow(&regs.g.v[e], gradient.v);
      narrow(&regs.m.v[e], mean.v);
      narrow(&regs.v.v[e], square.v);
      narrow(&regs.u.v[e], largest.v);
    }
    cuda::store<V>(w + i, regs.w);
    model.template store<V>(i, regs.w);
    if (math.scaled) cuda::store<V>(g + i, regs.g);
    cuda::store<V>(m + i, regs.m);
    cuda::store<V>(v + i, regs.v);
    if (math.amsgrad) cuda::store<V>(u + i, regs.u);
  }
};

// A unit without a gradient is what is left of a block.
template <class Types>
FUSED_SAM_HD double norm_unit(const Unit<SlimEntry>& u, const AscentGroup& group, int lane) {
  double sum = 0.0;
  if (u.entry->grad() == nullptr) return sum;
  Types::dispatch(*u.entry, [&](auto p, auto g, auto) {
    using P = decltype(p);
    using G = decltype(g);
    const P* w = static_cast<const P*>(u.entry->param()) + u.begin;
    const G* gradient = static_cast<const G*>(u.entry->grad()) + u.begin;
    if (!group.reads_weights()) {
      sum = sum_of_squares<P, G, false>(w, gradient, {}, u.count, lane);
      return;
    }
    const auto weighted = [&](auto adaptive, auto decays) {
      const WeightedGradient x_of{adaptive, decays, group.eta, group.decay};
      sum = sum_of_squares<P, G, true>(w, gradient, x_of, u.count, lane);
    };
    if (!Types::kConstant) return weighted(group.adaptive, group.decay != 0.0);
    if (!group.adaptive) return weighted(std::false_type{}, std::true_type{});
    settle<true>(group.decay != 0.0, [&](auto decays) { weighted(std::true_type{}, decays); });
  });
  return sum;
}

// Walks packs with what is constant for a launch known to the compiler.
template <bool kConstant, int V, class P, class G, class M>
FUSED_SAM_HD void walk(const Path<V>& path, const Perturb<P, G, M>& op, int lane) {
  path.walk_singles(op, lane);
  settle<kConstant>(op.math.sign, [&](auto sign) {
    settle<kConstant>(op.math.adaptive, [&](auto adaptive) {
      settle<kConstant>(op.math.decays, [&](auto decays) {
        Perturb<P, G, M> settled = op;
        settled.math.sign = sign;
        settled.math.adaptive = adaptive;
        settled.math.decays = decays;
        path.walk_packs(settled, lane);
      });
    });
  });
}

// q = 1 or 2.
template <class Types>
FUSED_SAM_HD void perturb_unit(const Unit<SlimEntry>& u, const AscentTerms& terms, double q, double norm, int lane) {
  const AscentScalars s = ascent_scalars(terms.rho.read(), terms.group, q, norm, u.entry->dtype() == DType::f64);
  Types::dispatch(*u.entry, [&](auto p, auto g, auto m) {
    using P = decltype(p);
    using G = decltype(g);
    using M = decltype(m);
    constexpr int V = pack_width<P, G>();
    P* w = static_cast<P*>(u.entry->param()) + u.begin;
    const G* gradient = static_cast<const G*>(u.entry->grad()) + u.begin;
    const AscentMath<Lane<typename Computed<P>::type>> math(s);
    if constexpr (std::is_same<M, NoModel>::value) {
      P* backup = static_cast<P*>(u.entry->backup()) + u.begin;
      if (!s.active) return copy(backup, w, u.count, lane);
      const Perturb<P, G, M> op{w, gradient, backup, w, math};
      walk<Types::kConstant>(path_of<V>(u.count, w, gradient, backup), op, lane);
    } else {
      if (!s.active) return;
      M* model = static_cast<M*>(u.entry->model()) + u.begin;
      const Perturb<P, G, M> op{w, gradient, nullptr, model, math};
      walk<Types::kConstant>(path_of<V>(u.count, w, gradient, model), op, lane);
    }
  });
}

// What a base step does to this lane's share of w: update(w, source, gradient, model), or, with `skip` or without a
// gradient, only the restore.
template <class Types, class E, class F>
FUSED_SAM_HD void descend_unit(const Unit<E>& u, bool skip, int lane, const F& update) {
  Types::dispatch(*u.entry, [&](auto p, auto g, auto m) {
    using P = decltype(p);
    using G = decltype(g);
    P* w = static_cast<P*>(u.entry->param()) + u.begin;
    const P* source = u.entry->backup() != nullptr ? static_cast<const P*>(u.entry->backup()) + u.begin : w;
    const ModelStore<P, decltype(m)> model(u);
    if (skip || u.entry->grad() == nullptr) return model.restore(w, source, u.count, lane);
    update(w, source, static_cast<G*>(u.entry->grad()) + u.begin, model);
  });
}

// Of all but the first step with momentum, what is constant for a launch is known to the compiler.
template <bool kConstant, int V, class P, class G, class M>
FUSED_SAM_HD void walk(const Path<V>& path, const Sgd<P, G, M>& op, int lane) {
  path.walk_singles(op, lane);
  if (!kConstant || !op.math.reads_buffer()) return path.walk_packs(op, lane);
  settle<kConstant>(op.math.scaled, [&](auto scaled) {
    settle<kConstant>(op.math.decays, [&](auto decays) {
      settle<kConstant>(op.math.nesterov, [&](auto nesterov) {
        Sgd<P, G, M> settled = op;
        settled.math.has_momentum = true;
        settled.math.first = false;
        settled.math.scaled = scaled;
        settled.math.decays = decays;
        settled.math.nesterov = nesterov;
        path.walk_packs(settled, lane);
      });
    });
  });
}

template <class Types>
FUSED_SAM_HD void sgd_unit(const Unit<SlimEntry>& u, const SgdTerms& terms, float grad_multiplier, bool skip,
                           int lane) {
  descend_unit<Types>(u, skip, lane, [&](auto* w, const auto* source, auto* gradient, auto model) {
    using P = Pointee<decltype(w)>;
    using G = Pointee<decltype(gradient)>;
    using M = typename decltype(model)::Type;
    constexpr int V = pack_width<P, G>();
    SgdGroup group = terms.group;
    group.lr = terms.lr.read();
    P* m = group.momentum != 0.0 ? static_cast<P*>(u.entry->state(0)) + u.begin : w;  // w: aligned like any other
    const SgdMath<Lane<typename Computed<P>::type>> math(group, grad_multiplier);
    const Sgd<P, G, M> op{w, source, gradient, m, math, model};
    walk<Types::kConstant>(path_of<V>(u.count, w, source, gradient, m, model.or_else(w)), op, lane);
  });
}

// Of all but the first step, what is constant for a launch is known to the compiler.
template <bool kConstant, int V, class P, class G, class M>
FUSED_SAM_HD void walk(const Path<V>& path, const Adam<P, G, M>& op, int lane) {
  path.walk_singles(op, lane);
  if (!kConstant || op.math.first) return path.template walk_packs<Adam<P, G, M>, 1>(op, lane);
  settle<kConstant>(op.math.scaled, [&](auto scaled) {
    settle<kConstant>(op.math.amsgrad, [&](auto amsgrad) {
      Adam<P, G, M> settled = op;
      settled.math.first = false;
      settled.math.scaled = scaled;
      settled.math.amsgrad = amsgrad;
      path.walk_packs(settled, lane);
    });
  });
}

template <class Types>
FUSED_SAM_HD void adam_unit(const Unit<WideEntry>& u, const AdamTerms& terms, float grad_multiplier, bool skip,
                            int lane) {
  descend_unit<Types>(u, skip, lane, [&](auto* w, const auto* source, auto* gradient, auto model) {
    using P = Pointee<decltype(w)>;
    using G = Pointee<decltype(gradient)>;
    using M = typename decltype(model)::Type;
    constexpr int V = pack_width<P, G>();
    const AdamScalars scalars = adam_scalars(terms.group, terms.lr.read(), u.entry->step());
    P* m = static_cast<P*>(u.entry->state(0)) + u.begin;
    P* v = static_cast<P*>(u.entry->state(1)) + u.begin;
    P* largest = scalars.group.amsgrad ? static_cast<P*>(u.entry->state(2)) + u.begin : v;
    const AdamMath<Lane<typename Computed<P>::type>> math(scalars, grad_multiplier);
    const Adam<P, G, M> op{w, source, gradient, m, v, largest, math, model};
    walk<Types::kConstant>(path_of<V>(u.count, w, source, gradient, m, v, largest, model.or_else(w)), op, lane);
  });
}

}  // namespace fused_sam::cuda
