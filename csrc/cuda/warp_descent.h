// The work of one warp lane on its unit, restore and base step; compiled for the GPU and, in the tests, for the CPU.
#pragma once

#include "warp_types.h"

namespace fused_sam::cuda {

template <class T>
struct Pointed;
template <class T>
struct Pointed<T*> {
  using type = T;
};
template <class T>
using Pointee = typename Pointed<T>::type;

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
  RoundedCopy<P, M> rounded;

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
    rounded.template store<V>(i, regs.w);
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
  RoundedCopy<P, M> rounded;

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
    rounded.template store<V>(i, regs.w);
    if (math.scaled) cuda::store<V>(g + i, regs.g);
    cuda::store<V>(m + i, regs.m);
    cuda::store<V>(v + i, regs.v);
    if (math.amsgrad) cuda::store<V>(u + i, regs.u);
  }
};

// What a base step does to this lane's share of w: update(w, source, gradient, rounded), or, with `skip` or without a
// gradient, only the restore.
template <class Types, class E, class F>
FUSED_SAM_HD void descend_unit(const Unit<E>& u, bool skip, int lane, const F& update) {
  Types::dispatch(*u.entry, [&](auto p, auto g, auto m) {
    using P = decltype(p);
    using G = decltype(g);
    P* w = static_cast<P*>(u.entry->param()) + u.begin;
    const P* source = u.entry->backup() != nullptr ? static_cast<const P*>(u.entry->backup()) + u.begin : w;
    const RoundedCopy<P, decltype(m)> rounded(u);
    if (skip || u.entry->grad() == nullptr) return rounded.restore(w, source, u.count, lane);
    update(w, source, static_cast<G*>(u.entry->grad()) + u.begin, rounded);
  });
}

// Walks packs; after the first step with momentum, what is constant for a launch is known to the compiler.
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
  descend_unit<Types>(u, skip, lane, [&](auto* w, const auto* source, auto* gradient, auto rounded) {
    using P = Pointee<decltype(w)>;
    using G = Pointee<decltype(gradient)>;
    using M = typename decltype(rounded)::Type;
    constexpr int V = pack_width<P, G>();
    SgdGroup group = terms.group;
    group.lr = terms.lr.read();
    P* m = group.momentum != 0.0 ? static_cast<P*>(u.entry->state(0)) + u.begin : w;  // w: aligned like any other
    const SgdMath<Lane<typename Computed<P>::type>> math(group, grad_multiplier);
    const Sgd<P, G, M> op{w, source, gradient, m, math, rounded};
    walk<Types::kConstant>(path_of<V>(u.count, w, source, gradient, m, rounded.or_else(w)), op, lane);
  });
}

// Walks packs; after the first step, what is constant for a launch is known to the compiler.
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
  descend_unit<Types>(u, skip, lane, [&](auto* w, const auto* source, auto* gradient, auto rounded) {
    using P = Pointee<decltype(w)>;
    using G = Pointee<decltype(gradient)>;
    using M = typename decltype(rounded)::Type;
    constexpr int V = pack_width<P, G>();
    const AdamScalars scalars = adam_scalars(terms.group, terms.lr.read(), u.entry->step());
    P* m = static_cast<P*>(u.entry->state(0)) + u.begin;
    P* v = static_cast<P*>(u.entry->state(1)) + u.begin;
    P* largest = scalars.group.amsgrad ? static_cast<P*>(u.entry->state(2)) + u.begin : v;
    const AdamMath<Lane<typename Computed<P>::type>> math(scalars, grad_multiplier);
    const Adam<P, G, M> op{w, source, gradient, m, v, largest, math, rounded};
    walk<Types::kConstant>(path_of<V>(u.count, w, source, gradient, m, v, largest, rounded.or_else(w)), op, lane);
  });
}

}  // namespace fused_sam::cuda
