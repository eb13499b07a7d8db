// Restore, and a running mean of gradients.
#include "kernels.cuh"
#include "unit_mean.h"

namespace fused_sam::cuda::device {
namespace {

constexpr int kBlocks = 3;  // as in norm.cu

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks)
    accumulate_kernel(const __grid_constant__ Arguments<MeanTerms, kBytes> arguments, const MeanUnits) {
  const Place here = place(false);
  if (here.unit >= arguments.units) return;
  const auto unit = arguments.walk().locate(here.unit);
  accumulate_unit(unit, arguments.group(unit.entry->group()), here.lane);
}

}  // namespace

void accumulate(const Target& target, const Slice<MeanTerms>& slice, int shift, const MeanUnits& terms) {
  launch(accumulate_kernel<kSmallPayload>, accumulate_kernel<kMostPayload>, target, slice, shift, terms,
         "restore_accumulate");
}

}  // namespace fused_sam::cuda::device
