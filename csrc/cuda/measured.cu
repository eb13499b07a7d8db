// Restore and base step in one pass, and ||m||_2 of the momentum that it leaves: a warp adds up the unit that it has
// written while the cache holds it, and the block that finishes last adds up the units.
#include "last_block.cuh"
#include "unit_momentum.h"

namespace fused_sam::cuda::device {
namespace {

constexpr int kBlocks = 2;  // as in update.cu

// To be called by a warp that has updated its unit; not part of the kernel, whose update needs all of the registers.
template <class Arguments>
__device__ __noinline__ void measure(const Arguments& arguments, Place here, double* partials) {
  __syncwarp();  // lanes read what others have written
  const double sum = add_lanes(momentum_unit(arguments.walk().locate(here.unit), here.lane));
  if (here.lane == 0) partials[here.unit] = sum;
}

// To be called by all threads.
__device__ void finish(const NormTerms& terms) {
  if (!terms.last || !is_last_block(terms.ticket)) return;
  const double sum = add_partials(terms);
  if (threadIdx.x == 0) *terms.out = {sqrt(sum), -1.0, -1.0};
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks)
    measured_sgd_kernel(const __grid_constant__ Arguments<SgdTerms, kBytes> arguments, const MeasuredTerms terms) {
  const Place here = place(false);
  if (here.unit < arguments.units) {
    const auto unit = arguments.walk().locate(here.unit);
    sgd_unit(unit, arguments.group(unit.entry->group()), terms.update.multiplier(), terms.update.skip(), here.lane);
    measure(arguments, here, terms.norm.partials + terms.norm.first_partial);
  }
  finish(terms.norm);
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks)
    measured_adam_kernel(const __grid_constant__ Arguments<AdamTerms, kBytes> arguments, const MeasuredTerms terms) {
  const Place here = place(false);
  if (here.unit < arguments.units) {
    const auto unit = arguments.walk().locate(here.unit);
    adam_unit(unit, arguments.group(unit.entry->group()), terms.update.multiplier(), terms.update.skip(), here.lane);
    measure(arguments, here, terms.norm.partials + terms.norm.first_partial);
  }
  finish(terms.norm);
}

MeasuredTerms with_ticket(const Target& target, const MeasuredTerms& terms) {
  MeasuredTerms ticketed = terms;
  ticketed.norm.ticket = take_ticket(target);
  return ticketed;
}

}  // namespace

void measured_sgd_update(const Target& target, const Slice<SgdTerms>& slice, int shift, const MeasuredTerms& terms) {
  launch(measured_sgd_kernel<kSmallPayload>, measured_sgd_kernel<kMostPayload>, target, slice, shift,
         with_ticket(target, terms), "sgd_update");
}

void measured_adam_update(const Target& target, const Slice<AdamTerms>& slice, int shift, const MeasuredTerms& terms) {
  launch(measured_adam_kernel<kSmallPayload>, measured_adam_kernel<kMostPayload>, target, slice, shift,
         with_ticket(target, terms), "adam_update");
}

}  // namespace fused_sam::cuda::device
