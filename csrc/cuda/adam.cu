// Restore and Adam step in one pass.
#include "kernels.cuh"

namespace fused_sam::cuda::device {
namespace {

constexpr int kBlocks = 2;  // as in update.cu

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks)
    adam_kernel(const __grid_constant__ Arguments<AdamTerms, kBytes> arguments, const UpdateTerms terms) {
  const Place here = place(false);
  if (here.unit >= arguments.units) return;
  const float multiplier = terms.multiplier();
  const auto unit = arguments.walk().locate(here.unit);
  adam_unit(unit, arguments.group(unit.entry->group()), multiplier, terms.skip(), here.lane);
}

}  // namespace

void adam_update(const Target& target, const Slice<AdamTerms>& slice, int shift, const UpdateTerms& terms) {
  launch(adam_kernel<kSmallPayload>, adam_kernel<kMostPayload>, target, slice, shift, terms, "adam_update");
}

}  // namespace fused_sam::cuda::device
