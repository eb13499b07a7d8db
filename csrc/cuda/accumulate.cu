// Restore, and a running mean of gradients.
#include "descent.cuh"

namespace fused_sam::cuda {

// mean <- mean + weight * (g - mean). g may be the mean: a lane reads its elements before it writes them.
template <class P, class G>
struct Accumulate {
  static constexpr int kUnroll = 2;
  P* mean;
  const G* g;
  AccumulateMath<Lane<typename Computed<P>::type>> math;

  template <int V>
  struct Regs {
    Pack<P, V> mean;
    Pack<G, V> g;
  };
  template <int V>
  __device__ __forceinline__ Regs<V> load(int i) const {
    Regs<V> regs;
    regs.g = cuda::load<V>(g + i);
    if (!math.first) {
      regs.mean = cuda::load<V>(mean + i);
    } else {
      for (int e = 0; e < V; ++e) regs.mean.v[e] = P{};
    }
    return regs;
  }
  template <int V>
  __device__ __forceinline__ void finish(int i, Regs<V> regs) const {
    for (int e = 0; e < V; ++e) narrow(&regs.mean.v[e], math({widen(regs.mean.v[e])}, {widen(regs.g.v[e])}).v);
    cuda::store<V>(mean + i, regs.mean);
  }
};

// Updates a unit of a mean if there is a gradient, else restores one of a parameter.
template <class Types>
__device__ __forceinline__ void accumulate_unit(const Unit<SlimEntry>& u, const AccumulateTerms& terms, int lane) {
  descend_unit<Types>(u, false, lane, [&](auto* mean, const auto*, auto* gradient, auto rounded) {
    using P = Pointee<decltype(mean)>;
    using G = Pointee<decltype(gradient)>;
    // A mean has no rounded copy: for lists that have one, the restore alone is compiled.
    if constexpr (std::is_same<typename decltype(rounded)::Type, NoRounded>::value) {
      constexpr int V = pack_width<P, G>();
      const Accumulate<P, G> op{mean, gradient, AccumulateMath<Lane<typename Computed<P>::type>>(terms.group)};
      const Path<V> path = path_of<V>(u.count, mean, gradient);
      path.walk_singles(op, lane);
      settle<Types::kConstant>(op.math.first, [&](auto first) {
        Accumulate<P, G> settled = op;
        settled.math.first = first;
        path.walk_packs(settled, lane);
      });
    }
  });
}

namespace {

constexpr int kBlocks = 4;  // as in norm.cu

template <class Types, int kBytes>
__global__ void __launch_bounds__(kThreads, Types::kConstant ? kBlocks : 2)
    accumulate_kernel(const __grid_constant__ Arguments<AccumulateTerms, kBytes> arguments, const AccumulateUnits) {
  const Place here = place(false);
  if (here.unit >= arguments.units) return;
  const auto unit = arguments.walk().locate(here.unit);
  accumulate_unit<Types>(unit, arguments.group(unit.entry->group()), here.lane);
}

}  // namespace

void launch_accumulate(const Target& target, const WorkList<AccumulateTerms>& list, const AccumulateUnits& terms) {
  const void* kernel = kernel_of(list.types(), list.bytes(), [](auto types, auto bytes) {
    return reinterpret_cast<const void*>(&accumulate_kernel<decltype(types), decltype(bytes)::value>);
  });
  launch(kernel, target, list, terms, "restore_accumulate");
}

}  // namespace fused_sam::cuda
