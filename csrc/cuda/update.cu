// Restore and SGD step in one pass.
#include "kernels.cuh"

namespace fused_sam::cuda::device {
namespace {

constexpr int kBlocks = 2;  // as in norm.cu; with three the registers would not do

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sgd_kernel(const __grid_constant__ Arguments<SgdTerms, kBytes> arguments, const UpdateTerms terms) {
  const Place here = place(false);
  if (here.unit >= arguments.units) return;
  const float multiplier = terms.multiplier();
  const auto unit = arguments.walk().locate(here.unit);
  sgd_unit(unit, arguments.group(unit.entry->group()), multiplier, terms.skip(), here.lane);
}

}  // namespace

void sgd_update(const Target& target, const Slice<SgdTerms>& slice, int shift, const UpdateTerms& terms) {
  launch(sgd_kernel<kSmallPayload>, sgd_kernel<kMostPayload>, target, slice, shift, terms, "sgd_update");
}

}  // namespace fused_sam::cuda::device
