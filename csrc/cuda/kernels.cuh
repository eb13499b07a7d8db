// What the kernels share on the device, and the launch of one slice.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "ops.h"

namespace fused_sam::cuda::device {

#if CUDART_VERSION >= 12010
constexpr int kMostPayload = kLargePayload;
#else
constexpr int kMostPayload = kSmallPayload;
#endif

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ").");
}

// The unit that a warp works on. `reverse` starts with the last block: its data is what the cache still holds.
struct Place {
  uint32_t unit;
  int lane;
};

__device__ __forceinline__ Place place(bool reverse) {
  const uint32_t block = reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  return {block * kUnitsPerBlock + threadIdx.x / kWarp, static_cast<int>(threadIdx.x % kWarp)};
}

template <int kBytes, class Group, class Terms>
void launch_as(void (*kernel)(Arguments<Group, kBytes>, Terms), const Target& target, const Slice<Group>& slice,
               int shift, const Terms& terms, const char* what) {
  static thread_local Arguments<Group, kBytes> arguments;  // 32 KB: not for the stack of any thread
  slice.fill(&arguments, shift);
  check(cudaSetDevice(target.device), what);
  const auto blocks = static_cast<unsigned>((slice.units + kUnitsPerBlock - 1) / kUnitsPerBlock);
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(target.stream)>>>(arguments, terms);
  check(cudaGetLastError(), what);
}

// Every kernel exists for two sizes of arguments: copying 32 KB for a few tensors would be waste, and drivers before
// CUDA 12.1 take 4 KB.
template <class Group, class Terms>
void launch(void (*small)(Arguments<Group, kSmallPayload>, Terms), void (*large)(Arguments<Group, kMostPayload>, Terms),
            const Target& target, const Slice<Group>& slice, int shift, const Terms& terms, const char* what) {
  if (slice.bytes() <= kSmallPayload) {
    launch_as(small, target, slice, shift, terms, what);
  } else {
    launch_as(large, target, slice, shift, terms, what);
  }
}

}  // namespace fused_sam::cuda::device
