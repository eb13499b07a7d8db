// ||T g||_2 of all tensors: a partial sum for each unit, added by the block that finishes last.
#include "last_block.cuh"

namespace fused_sam::cuda::device {
namespace {

// Blocks per multiprocessor, so registers per thread: enough of both for the loads in flight that the memory needs.
constexpr int kBlocks = 3;

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks)
    norm_kernel(const __grid_constant__ Arguments<AscentTerms, kBytes> arguments, const NormTerms terms) {
  const Place here = place(false);
  if (here.unit < arguments.units) {
    const auto unit = arguments.walk().locate(here.unit);
    const double sum = add_lanes(norm_unit(unit, arguments.group(unit.entry->group()).group, here.lane));
    if (here.lane == 0) terms.partials[terms.first_partial + here.unit] = sum;
  }
  if (!terms.last || !is_last_block(terms.ticket)) return;
  const double sum = add_partials(terms);
  if (threadIdx.x == 0) *terms.out = {sqrt(sum), -1.0, -1.0};
}

}  // namespace

void norm(const Target& target, const Slice<AscentTerms>& slice, int shift, const NormTerms& terms) {
  NormTerms with_ticket = terms;
  with_ticket.ticket = take_ticket(target);
  launch(norm_kernel<kSmallPayload>, norm_kernel<kMostPayload>, target, slice, shift, with_ticket, "norm");
}

void clear(const Target& target, Norm* out) {
  check(cudaSetDevice(target.device), "norm");
  check(cudaMemsetAsync(out, 0, sizeof(*out), static_cast<cudaStream_t>(target.stream)), "norm");
}

}  // namespace fused_sam::cuda::device
