// The work of one warp lane on its unit, from w to w + e; compiled for the GPU and, in the tests, for the CPU.
#pragma once

#include "warp_types.h"

namespace fused_sam::cuda {

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

// backup <- w, target <- w + e. The target is w itself, or the rounded copy where w is a master, which is its own
// backup. backup may be grad: a lane reads its elements before it writes them.
template <class P, class G, class M>
struct Perturb {
  static constexpr int kUnroll = sizeof(P) == sizeof(G) ? 2 : 4;
  using T = RoundedOr<P, M>;
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
    if constexpr (std::is_same<M, NoRounded>::value) cuda::store<V>(backup + i, regs.w);
    cuda::store<V>(target + i, perturbed);
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
    if constexpr (std::is_same<M, NoRounded>::value) {
      P* backup = static_cast<P*>(u.entry->backup()) + u.begin;
      if (!s.active) return copy(backup, w, u.count, lane);
      const Perturb<P, G, M> op{w, gradient, backup, w, math};
      walk<Types::kConstant>(path_of<V>(u.count, w, gradient, backup), op, lane);
    } else {
      if (!s.active) return;
      M* rounded = static_cast<M*>(u.entry->rounded()) + u.begin;
      const Perturb<P, G, M> op{w, gradient, nullptr, rounded, math};
      walk<Types::kConstant>(path_of<V>(u.count, w, gradient, rounded), op, lane);
    }
  });
}

}  // namespace fused_sam::cuda
