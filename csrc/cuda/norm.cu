// ||T g||_2 of all tensors: a partial sum for each block, added by the block that finishes last. For q other than 2 the
// largest |x| in the same way, and then the sum of powers scaled by it; for q = 2 that sum only where squares have left
// the range of fp64.
#include "last_block.cuh"
#include "vector.cuh"

namespace fused_sam::cuda {

// This lane's part of the sum of squares of x, over elements that depend on the sizes alone. Without `kWeighted` x is
// g. Whether memory is aligned is decided outside of the loop: one that merges both kinds of loads waits for each.
template <class P, class G, bool kWeighted, bool kAligned>
__device__ __forceinline__ double sum_of_squares(const P* w, const G* g, const WeightedGradient& x_of, int count,
                                                 int lane) {
  constexpr int V = kWeighted ? pack_width<P, G>() : pack_width<G>();
  constexpr int kUnroll = kWeighted ? 2 : 4;
  double sums[kUnroll] = {};
  const auto add = [&](int k, G gradient, P weight) {
    const double x = kWeighted ? x_of(widen(weight), widen(gradient)) : widen(gradient);
    sums[k] = ::fma(x, x, sums[k]);
  };
  const int packs = count / V;
#pragma unroll 1
  for (int j = lane; j < packs; j += kWarp * kUnroll) {
    Pack<G, V> gradients[kUnroll];
    Pack<P, V> weights[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int i = (j + k * kWarp) * V;
      if (j + k * kWarp >= packs) break;
      gradients[k] = load_as<V, kAligned>(g + i);
      if (kWeighted) weights[k] = load_as<V, kAligned>(w + i);
    }
#pragma unroll
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
__device__ __forceinline__ double sum_of_squares(const P* w, const G* g, const WeightedGradient& x_of, int count,
                                                 int lane) {
  constexpr int V = kWeighted ? pack_width<P, G>() : pack_width<G>();
  return misalignment<V>(g) == 0 && (!kWeighted || misalignment<V>(w) == 0)
             ? sum_of_squares<P, G, kWeighted, true>(w, g, x_of, count, lane)
             : sum_of_squares<P, G, kWeighted, false>(w, g, x_of, count, lane);
}

// A unit without a gradient is what is left of a block.
template <class Types>
__device__ __forceinline__ double norm_unit(const Unit<SlimEntry>& u, const AscentGroup& group, int lane) {
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

// Calls visit(w, g, i) for this lane's elements, with both as fp64 and i counted from the tensor's first.
template <class Visit>
__device__ __forceinline__ void for_each_element(const Unit<SlimEntry>& u, int lane, const Visit& visit) {
  dispatch(u.entry->dtype(), u.entry->grad_dtype(), [&](auto p, auto q) {
    const auto* w = static_cast<const decltype(p)*>(u.entry->param());
    const auto* g = static_cast<const decltype(q)*>(u.entry->grad());
#pragma unroll 1
    for (int64_t i = u.begin + lane; i < u.begin + u.count; i += kWarp) {
      visit(static_cast<double>(widen(w[i])), static_cast<double>(widen(g[i])), i);
    }
  });
}

// The largest |x| of a unit, a block or all, and where it is.
struct PeakPartial {
  double value = 0.0, tensor = -1.0, element = -1.0;

  // Of equal ones the first in the list stays.
  __device__ __forceinline__ void raise(const PeakPartial& other) {
    const bool equal = other.value == value || (other.value != other.value && value != value);
    const bool before = other.element >= 0 &&
                        (element < 0 || other.tensor < tensor || (other.tensor == tensor && other.element < element));
    if (Peak{value, 0}.is_below(other.value) || (equal && before)) *this = other;
  }
};

// That of one lane. A unit without a gradient is what is left of a block.
__device__ __forceinline__ PeakPartial peak_unit(const Unit<SlimEntry>& u, const AscentGroup& group, int lane) {
  if (u.entry->grad() == nullptr) return {};
  Peak result;
  for_each_element(u, lane, [&](double w, double g, int64_t i) { result.add(scaled(w, g, group), i); });
  return {result.value, static_cast<double>(u.entry->number()), static_cast<double>(result.element)};
}

__device__ __forceinline__ double powers_unit(const Unit<SlimEntry>& u, const AscentGroup& group, double q,
                                              double scale, int lane) {
  double sum = 0.0;
  if (u.entry->grad() == nullptr) return sum;
  for_each_element(u, lane, [&](double w, double g, int64_t) { sum += power_of(scaled(w, g, group), scale, q); });
  return sum;
}

// From the sum of x^2: the norm, or what the pass over powers that follows has to know.
__device__ __forceinline__ Norm norm_of_squares(double sum, bool again) {
  const double norm = ::sqrt(sum), scale = again ? far_scale(norm) : 0.0;
  return scale > 0.0 ? Norm{scale, 0.0, -1.0} : Norm{norm, -1.0, -1.0};
}

// From the largest |x|, or another scale, and the sum of (|x| / scale)^q. A largest that is zero or not finite is the
// norm itself.
__device__ __forceinline__ Norm norm_of_powers(double scale, double sum, double q) {
  const bool usable = scale > 0.0 && scale <= 1.7976931348623157e308;
  return {usable ? scale * ::pow(sum, 1.0 / q) : scale, -1.0, -1.0};
}

namespace {

// Blocks per multiprocessor, so registers per thread: enough of both for the loads in flight that the memory needs.
constexpr int kBlocks = 4;

template <class Types, int kBytes>
__global__ void __launch_bounds__(kThreads, Types::kConstant ? kBlocks : 2)
    norm_kernel(const __grid_constant__ Arguments<AscentTerms, kBytes> arguments, const NormTerms terms) {
  const Place here = place(false);
  double sum = 0.0;
  if (here.unit < arguments.units) {
    const auto unit = arguments.walk().locate(here.unit);
    sum = norm_unit<Types>(unit, arguments.group(unit.entry->group()).group, here.lane);
  }
  if (!leave_sum(sum, terms)) return;
  sum = add_partials(terms);
  if (threadIdx.x == 0) *terms.out = norm_of_squares(sum, terms.again);
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks)
    powers_kernel(const __grid_constant__ Arguments<AscentTerms, kBytes> arguments, const NormTerms terms) {
  if (terms.out->tensor < 0.0) return;  // all blocks do
  const Place here = place(false);
  double sum = 0.0;
  if (here.unit < arguments.units) {
    const auto unit = arguments.walk().locate(here.unit);
    sum = powers_unit(unit, arguments.group(unit.entry->group()).group, terms.q, terms.out->value, here.lane);
  }
  if (!leave_sum(sum, terms)) return;
  sum = add_partials(terms);
  if (threadIdx.x == 0) *terms.out = norm_of_powers(terms.out->value, sum, terms.q);
}

__device__ PeakPartial highest_lane(PeakPartial peak) {
  for (int half = kWarp / 2; half > 0; half /= 2) {
    PeakPartial other;
    other.value = __shfl_down_sync(0xffffffff, peak.value, half);
    other.tensor = __shfl_down_sync(0xffffffff, peak.tensor, half);
    other.element = __shfl_down_sync(0xffffffff, peak.element, half);
    peak.raise(other);
  }
  return peak;
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads)
    peak_kernel(const __grid_constant__ Arguments<AscentTerms, kBytes> arguments, const NormTerms terms) {
  __shared__ double highest_of_warps[kUnitsPerBlock][3];
  const Place here = place(false);
  auto* partials = reinterpret_cast<PeakPartial*>(terms.partials);
  PeakPartial highest;
  if (here.unit < arguments.units) {
    const auto unit = arguments.walk().locate(here.unit);
    highest = highest_lane(peak_unit(unit, arguments.group(unit.entry->group()).group, here.lane));
  }
  double* mine = highest_of_warps[threadIdx.x / kWarp];
  if (here.lane == 0) {
    mine[0] = highest.value;
    mine[1] = highest.tensor;
    mine[2] = highest.element;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (const auto& other : highest_of_warps) highest.raise({other[0], other[1], other[2]});
    partials[terms.first_block + blockIdx.x] = highest;
  }
  if (!terms.last || !is_last_block(terms.ticket) || threadIdx.x >= kWarp) return;
  highest = {};
  for (uint32_t i = threadIdx.x; i < terms.blocks; i += kWarp) {
    highest.raise({__ldcg(&partials[i].value), __ldcg(&partials[i].tensor), __ldcg(&partials[i].element)});
  }
  highest = highest_lane(highest);
  if (threadIdx.x == 0) *terms.out = {highest.value, highest.tensor, highest.element};
}

// kernel_for(types, bytes), as in kernel_of.
template <class F>
void launch_pass(const Target& target, const WorkList<AscentTerms>& list, const NormTerms& terms, const F& kernel_for) {
  NormTerms with_ticket = terms;
  with_ticket.ticket = take_ticket(target);
  launch(kernel_of(list.types(), list.bytes(), kernel_for), target, list, with_ticket, "norm");
}

}  // namespace

void launch_norm(const Target& target, const WorkList<AscentTerms>& list, const NormTerms& terms) {
  launch_pass(target, list, terms, [](auto types, auto bytes) {
    return reinterpret_cast<const void*>(&norm_kernel<decltype(types), decltype(bytes)::value>);
  });
}

void launch_peak(const Target& target, const WorkList<AscentTerms>& list, const NormTerms& terms) {
  launch_pass(target, list, terms,
              [](auto, auto bytes) { return reinterpret_cast<const void*>(&peak_kernel<decltype(bytes)::value>); });
}

void launch_powers(const Target& target, const WorkList<AscentTerms>& list, const NormTerms& terms) {
  launch_pass(target, list, terms,
              [](auto, auto bytes) { return reinterpret_cast<const void*>(&powers_kernel<decltype(bytes)::value>); });
}

void clear_norm(const Target& target, Norm* out) {
  check(cudaSetDevice(target.device), "norm");
  check(cudaMemsetAsync(out, 0, sizeof(*out), static_cast<cudaStream_t>(target.stream)), "norm");
}

}  // namespace fused_sam::cuda
