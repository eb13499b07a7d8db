// ||T g||_2 of all tensors: a partial sum for each block, added by the block that finishes last. For q other than 2 the
// largest |x| in the same way, and then the sum of powers scaled by it; for q = 2 that sum only where squares have left
// the range of fp64.
#include "last_block.cuh"
#include "ops.cuh"
#include "warp_ascent.h"
#include "warp_powers.h"

namespace fused_sam::cuda::device {
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
void launch_norm(const Target& target, const WorkList<AscentTerms>& list, const NormTerms& terms, const F& kernel_for) {
  NormTerms with_ticket = terms;
  with_ticket.ticket = take_ticket(target);
  launch(kernel_of(list.types(), list.bytes(), kernel_for), target, list, with_ticket, "norm");
}

}  // namespace

void norm(const Target& target, const WorkList<AscentTerms>& list, const NormTerms& terms) {
  launch_norm(target, list, terms, [](auto types, auto bytes) {
    return reinterpret_cast<const void*>(&norm_kernel<decltype(types), decltype(bytes)::value>);
  });
}

void peak(const Target& target, const WorkList<AscentTerms>& list, const NormTerms& terms) {
  launch_norm(target, list, terms,
              [](auto, auto bytes) { return reinterpret_cast<const void*>(&peak_kernel<decltype(bytes)::value>); });
}

void powers(const Target& target, const WorkList<AscentTerms>& list, const NormTerms& terms) {
  launch_norm(target, list, terms,
              [](auto, auto bytes) { return reinterpret_cast<const void*>(&powers_kernel<decltype(bytes)::value>); });
}

void clear(const Target& target, Norm* out) {
  check(cudaSetDevice(target.device), "norm");
  check(cudaMemsetAsync(out, 0, sizeof(*out), static_cast<cudaStream_t>(target.stream)), "norm");
}

}  // namespace fused_sam::cuda::device
