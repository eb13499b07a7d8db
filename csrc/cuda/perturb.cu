// backup <- w, w <- w + e.
#include "launch.cuh"
#include "ops.cuh"
#include "warp_ascent.h"
#include "warp_powers.h"

namespace fused_sam::cuda::device {
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

void perturb(const Target& target, const WorkList<AscentTerms>& list, const PerturbTerms& terms) {
  const bool powers = terms.q != 1.0 && terms.q != 2.0;
  const void* kernel = kernel_of(list.types(), list.bytes(), [powers](auto types, auto bytes) {
    return powers ? reinterpret_cast<const void*>(&power_perturb_kernel<decltype(bytes)::value>)
                  : reinterpret_cast<const void*>(&perturb_kernel<decltype(types), decltype(bytes)::value>);
  });
  launch(kernel, target, list, terms, "perturb");
}

}  // namespace fused_sam::cuda::device
