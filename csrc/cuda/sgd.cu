// Restore and SGD step in one pass.
#include "descent.cuh"

namespace fused_sam::cuda {

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
  __device__ __forceinline__ Regs<V> load(int i) const {
    Regs<V> regs;
    regs.w = cuda::load<V>(source + i);
    regs.g = cuda::load<V>(g + i);
    regs.m = Pack<P, V>{};  // not w: the load of m would wait for it
    if (math.reads_buffer()) regs.m = cuda::load<V>(m + i);
    return regs;
  }
  template <int V>
  __device__ __forceinline__ void finish(int i, Regs<V> regs) const {
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

// Walks packs; after the first step with momentum, what is constant for a launch is known to the compiler.
template <bool kConstant, int V, class P, class G, class M>
__device__ __forceinline__ void walk(const Path<V>& path, const Sgd<P, G, M>& op, int lane) {
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
__device__ __forceinline__ void sgd_unit(const Unit<SlimEntry>& u, const SgdTerms& terms, float grad_multiplier,
                                         bool skip, int lane) {
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

namespace {

constexpr int kBlocks = 3;  // as in norm.cu; with four the registers would not do

template <class Types, int kBytes>
__global__ void __launch_bounds__(kThreads, Types::kConstant ? kBlocks : 2)
    sgd_kernel(const __grid_constant__ Arguments<SgdTerms, kBytes> arguments, const UpdateTerms terms) {
  const Place here = place(false);
  if (here.unit >= arguments.units) return;
  const auto unit = arguments.walk().locate(here.unit);
  sgd_unit<Types>(unit, arguments.group(unit.entry->group()), terms.multiplier(), terms.skip(), here.lane);
}

}  // namespace

void launch_sgd(const Target& target, const WorkList<SgdTerms>& list, const UpdateTerms& terms) {
  const void* kernel = kernel_of(list.types(), list.bytes(), [](auto types, auto bytes) {
    return reinterpret_cast<const void*>(&sgd_kernel<decltype(types), decltype(bytes)::value>);
  });
  launch(kernel, target, list, terms, "sgd_update");
}

}  // namespace fused_sam::cuda
