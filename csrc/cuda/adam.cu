// Restore and Adam step in one pass.
#include "descent.cuh"

namespace fused_sam::cuda {

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
  __device__ __forceinline__ Regs<V> load(int i) const {
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
  __device__ __forceinline__ void finish(int i, Regs<V> regs) const {
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

// Walks packs; after the first step, what is constant for a launch is known to the compiler.
template <bool kConstant, int V, class P, class G, class M>
__device__ __forceinline__ void walk(const Path<V>& path, const Adam<P, G, M>& op, int lane) {
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
__device__ __forceinline__ void adam_unit(const Unit<WideEntry>& u, const AdamTerms& terms, float grad_multiplier,
                                          bool skip, int lane) {
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

namespace {

// As in norm.cu, where the registers do.
template <class Types>
constexpr int kBlocks = 2;
template <class G, class M>
constexpr int kBlocks<OneType<float, G, M>> = 3;

template <class Types, int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks<Types> - kFewerBlocks)
    adam_kernel(const __grid_constant__ Arguments<AdamTerms, kBytes> arguments, const UpdateTerms terms) {
  const Place here = place(false);
  if (here.unit >= arguments.units) return;
  const auto unit = arguments.walk().locate(here.unit);
  adam_unit<Types>(unit, arguments.group(unit.entry->group()), terms.multiplier(), terms.skip(), here.lane);
}

}  // namespace

void launch_adam(const Target& target, const WorkList<AdamTerms>& list, const UpdateTerms& terms) {
  const void* kernel = kernel_of(list.types(), list.bytes(), [](auto types, auto bytes) {
    return reinterpret_cast<const void*>(&adam_kernel<decltype(types), decltype(bytes)::value>);
  });
  launch(kernel, target, list, terms, "adam_update");
}

}  // namespace fused_sam::cuda
