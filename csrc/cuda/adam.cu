// Restore and Adam step in one pass.
#include "launch.cuh"
#include "ops.cuh"
#include "warp_descent.h"

namespace fused_sam::cuda::device {
namespace {

// As in norm.cu, where the registers do.
template <class Types>
constexpr int kBlocks = 2;
template <class G, class M>
constexpr int kBlocks<OneType<float, G, M>> = 3;

template <class Types, int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks<Types> - kFewerBlocks)
    adam_kernel(const __grid_constant__ Arguments<AdamTerms, kBytes> arguments, const UpdateTerms terms) {
  const Place here = place(false);
  if (here.unit >= arguments.units) return;
  const auto unit = arguments.walk().locate(here.unit);
  adam_unit<Types>(unit, arguments.group(unit.entry->group()), terms.multiplier(), terms.skip(), here.lane);
}

}  // namespace

void adam_update(const Target& target, const WorkList<AdamTerms>& list, const UpdateTerms& terms) {
  const void* kernel = kernel_of(list.types(), list.bytes(), [](auto types, auto bytes) {
    return reinterpret_cast<const void*>(&adam_kernel<decltype(types), decltype(bytes)::value>);
  });
  launch(kernel, target, list, terms, "adam_update");
}

}  // namespace fused_sam::cuda::device
