// Restore and SGD step in one pass.
#include "launch.cuh"
#include "ops.cuh"
#include "warp_descent.h"

namespace fused_sam::cuda::device {
namespace {

constexpr int kBlocks = 3;  // as in norm.cu; with four the registers would not do

template <class Types, int kBytes>
__global__ void __launch_bounds__(kThreads, Types::kConstant ? kBlocks : 2)
    sgd_kernel(const __grid_constant__ Arguments<SgdTerms, kBytes> arguments, const UpdateTerms terms) {
  const Place here = place(false);
  if (here.unit >= arguments.units) return;
  const auto unit = arguments.walk().locate(here.unit);
  sgd_unit<Types>(unit, arguments.group(unit.entry->group()), terms.multiplier(), terms.skip(), here.lane);
}

}  // namespace

void sgd_update(const Target& target, const WorkList<SgdTerms>& list, const UpdateTerms& terms) {
  const void* kernel = kernel_of(list.types(), list.bytes(), [](auto types, auto bytes) {
    return reinterpret_cast<const void*>(&sgd_kernel<decltype(types), decltype(bytes)::value>);
  });
  launch(kernel, target, list, terms, "sgd_update");
}

}  // namespace fused_sam::cuda::device
