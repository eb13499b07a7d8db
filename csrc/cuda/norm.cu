// ||T g||_2 of all tensors: a partial sum for each unit, added by the block that finishes last.
#include <atomic>

#include "kernels.cuh"

namespace fused_sam::cuda::device {
namespace {

// Blocks per multiprocessor, so registers per thread: enough of both for the loads in flight that the memory needs.
constexpr int kBlocks = 3;

// Counters of finished blocks, one for each launch that may be running; each is back at zero when its launch is done.
// Launches of a CUDA graph keep theirs for as long as the graph may be replayed, so they have counters of their own.
constexpr uint32_t kTickets = 8192;
__device__ unsigned int tickets[2 * kTickets];

uint32_t take_ticket(cudaStream_t stream) {
  static std::atomic<uint32_t> eager{0}, captured{0};
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "norm");
  return status == cudaStreamCaptureStatusNone ? eager++ % kTickets : kTickets + captured++ % kTickets;
}

__device__ void add_partials(const NormTerms& terms) {
  __shared__ bool is_last;
  __shared__ double lanes[kThreads];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicInc(&tickets[terms.ticket], gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  double sum = 0.0;
  for (uint32_t i = threadIdx.x; i < terms.total; i += kThreads) sum += __ldcg(terms.partials + i);
  lanes[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *terms.out = sqrt(lanes[0]);
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocks)
    norm_kernel(const __grid_constant__ Arguments<AscentTerms, kBytes> arguments, const NormTerms terms) {
  const Place here = place(false);
  if (here.unit < arguments.units) {
    const auto unit = arguments.walk().locate(here.unit);
    double sum = norm_unit(unit, arguments.group(unit.entry->group()).adaptive, here.lane);
    for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xffffffff, sum, half);
    if (here.lane == 0) terms.partials[terms.first_partial + here.unit] = sum;
  }
  if (terms.last) add_partials(terms);
}

}  // namespace

void norm(const Target& target, const Slice<AscentTerms>& slice, int shift, const NormTerms& terms) {
  NormTerms with_ticket = terms;
  check(cudaSetDevice(target.device), "norm");
  with_ticket.ticket = take_ticket(static_cast<cudaStream_t>(target.stream));
  launch(norm_kernel<kSmallPayload>, norm_kernel<kMostPayload>, target, slice, shift, with_ticket, "norm");
}

void clear(const Target& target, double* out) {
  check(cudaSetDevice(target.device), "norm");
  check(cudaMemsetAsync(out, 0, sizeof(*out), static_cast<cudaStream_t>(target.stream)), "norm");
}

}  // namespace fused_sam::cuda::device
