// What blocks of a norm leave, and finding the one that finishes last: it adds up what the others have left.
#pragma once

#include <atomic>

#include "launch.cuh"

namespace fused_sam::cuda {
namespace {

// Counters of finished blocks, one for each launch that may be running; each is back at zero when its launch is done.
// Launches of a CUDA graph keep theirs for as long as the graph may be replayed, so they have counters of their own.
constexpr uint32_t kTickets = 8192;
__device__ unsigned int tickets[2 * kTickets];

uint32_t take_ticket(const Target& target) {
  static std::atomic<uint32_t> eager{0}, captured{0};
  check(cudaSetDevice(target.device), "norm");
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(target.stream), &status), "norm");
  return status == cudaStreamCaptureStatusNone ? eager++ % kTickets : kTickets + captured++ % kTickets;
}

// To be called by all threads of all blocks. What a block's first thread wrote to global memory before is visible where
// it is true.
__device__ bool is_last_block(uint32_t ticket) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(&tickets[ticket], gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

// The sum of all lanes, on the first: lane k takes in lane k + half, for every half.
__device__ double add_lanes(double sum) {
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xffffffff, sum, half);
  return sum;
}

// The same additions, of numbers in memory.
__device__ double add_warps(double* sums) {
  for (int half = kUnitsPerBlock / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

// Adds up the sums of all threads and leaves the block's. To be called by all threads of all blocks; true in the one
// that is to add up the blocks'.
__device__ bool leave_sum(double sum, const NormTerms& terms) {
  __shared__ double warps[kUnitsPerBlock];
  sum = add_lanes(sum);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) terms.partials[terms.first_block + blockIdx.x] = add_warps(warps);
  return terms.last && is_last_block(terms.ticket);
}

// The sum of all partials, on thread 0.
__device__ double add_partials(const NormTerms& terms) {
  __shared__ double lanes[kThreads];
  double sum = 0.0;
  for (uint32_t i = threadIdx.x; i < terms.blocks; i += kThreads) sum += __ldcg(terms.partials + i);
  lanes[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace fused_sam::cuda
