// Restore, and a running mean of gradients.
#include "launch.cuh"
#include "ops.cuh"
#include "warp_accumulate.h"

namespace fused_sam::cuda::device {
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

void accumulate(const Target& target, const WorkList<AccumulateTerms>& list, const AccumulateUnits& terms) {
  const void* kernel = kernel_of(list.types(), list.bytes(), [](auto types, auto bytes) {
    return reinterpret_cast<const void*>(&accumulate_kernel<decltype(types), decltype(bytes)::value>);
  });
  launch(kernel, target, list, terms, "restore_accumulate");
}

}  // namespace fused_sam::cuda::device
