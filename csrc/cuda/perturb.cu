// backup <- w, w <- w + e.
#include "launch.cuh"
#include "rounded_copy.cuh"

namespace fused_sam::cuda {

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
  __device__ __forceinline__ Regs<V> load(int i) const {
    return {cuda::load<V>(w + i), cuda::load<V>(g + i)};
  }
  template <int V>
  __device__ __forceinline__ void finish(int i, const Regs<V>& regs) const {
    Pack<T, V> perturbed;
    for (int e = 0; e < V; ++e) narrow(&perturbed.v[e], math({widen(regs.w.v[e])}, {widen(regs.g.v[e])}).v);
    if constexpr (std::is_same<M, NoRounded>::value) cuda::store<V>(backup + i, regs.w);
    cuda::store<V>(target + i, perturbed);
  }
};

// Walks packs with what is constant for a launch known to the compiler.
template <bool kConstant, int V, class P, class G, class M>
__device__ __forceinline__ void walk(const Path<V>& path, const Perturb<P, G, M>& op, int lane) {
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
__device__ __forceinline__ void perturb_unit(const Unit<SlimEntry>& u, const AscentTerms& terms, double q, double norm,
                                             int lane) {
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

__device__ __forceinline__ void power_perturb_unit(const Unit<SlimEntry>& u, const AscentTerms& terms, double q,
                                                   const Norm& norm, int lane) {
  const double rho = terms.rho.read();
  const bool active = ascent_scalars(rho, terms.group, q, norm.value, true).active;
  const bool infinite = q > 1.7976931348623157e308;
  const bool here = infinite && static_cast<double>(u.entry->number()) == norm.tensor;
  const int64_t element = here ? static_cast<int64_t>(norm.element) - u.begin : -1;
  dispatch(u.entry->dtype(), u.entry->grad_dtype(), u.entry->rounded_dtype(), [&](auto p, auto g, auto m) {
    using P = decltype(p);
    using Out = RoundedOr<P, decltype(m)>;
    constexpr bool kHasRounded = std::is_same<Out, decltype(m)>::value;
    P* w = static_cast<P*>(u.entry->param()) + u.begin;
    Out* target = static_cast<Out*>(kHasRounded ? u.entry->rounded() : u.entry->param()) + u.begin;
    P* backup = kHasRounded ? nullptr : static_cast<P*>(u.entry->backup()) + u.begin;
    const auto* gradient = static_cast<const decltype(g)*>(u.entry->grad()) + u.begin;
#pragma unroll 1
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

namespace {

constexpr int kBlocks = 4;  // as in norm.cu

template <class Types, int kBytes>
__global__ void __launch_bounds__(kThreads, Types::kConstant ? kBlocks : 2)
    perturb_kernel(const __grid_constant__ Arguments<AscentTerms, kBytes> arguments, const PerturbTerms terms) {
  const Place here = place(true);
  if (here.unit >= arguments.units) return;
  const auto unit = arguments.walk().locate(here.unit);
  perturb_unit<Types>(unit, arguments.group(unit.entry->group()), terms.q, terms.q == 1.0 ? 0.0 : terms.norm->value,
                      here.lane);
}

// q other than 1 and 2.
template <int kBytes>
__global__ void __launch_bounds__(kThreads)
    power_perturb_kernel(const __grid_constant__ Arguments<AscentTerms, kBytes> arguments, const PerturbTerms terms) {
  const Place here = place(true);
  if (here.unit >= arguments.units) return;
  const auto unit = arguments.walk().locate(here.unit);
  power_perturb_unit(unit, arguments.group(unit.entry->group()), terms.q, *terms.norm, here.lane);
}

}  // namespace

void launch_perturb(const Target& target, const WorkList<AscentTerms>& list, const PerturbTerms& terms) {
  const bool powers = terms.q != 1.0 && terms.q != 2.0;
  const void* kernel = kernel_of(list.types(), list.bytes(), [powers](auto types, auto bytes) {
    return powers ? reinterpret_cast<const void*>(&power_perturb_kernel<decltype(bytes)::value>)
                  : reinterpret_cast<const void*>(&perturb_kernel<decltype(types), decltype(bytes)::value>);
  });
  launch(kernel, target, list, terms, "perturb");
}

}  // namespace fused_sam::cuda
