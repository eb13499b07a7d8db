// backup <- w, w <- w + e.
#include "kernels.cuh"

namespace fused_sam::cuda::device {
namespace {

constexpr int kBlocks = 3;  // as in norm.cu

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks)
    perturb_kernel(const __grid_constant__ Arguments<AscentTerms, kBytes> arguments, const PerturbTerms terms) {
  const Place here = place(true);
  if (here.unit >= arguments.units) return;
  const auto unit = arguments.walk().locate(here.unit);
  perturb_unit(unit, arguments.group(unit.entry->group()), terms.q, terms.q == 1.0 ? 0.0 : terms.norm->value,
               here.lane);
}

}  // namespace

void perturb(const Target& target, const Slice<AscentTerms>& slice, int shift, const PerturbTerms& terms) {
  launch(perturb_kernel<kSmallPayload>, perturb_kernel<kMostPayload>, target, slice, shift, terms, "perturb");
}

}  // namespace fused_sam::cuda::device
