// What the kernels share on the device, and how they are launched.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../arithmetic.h"
#include "launches.h"

namespace fused_sam::cuda {

#if CUDART_VERSION >= 12010
constexpr int kMostPayload = kLargePayload;
#else
constexpr int kMostPayload = kSmallPayload;
#endif

// Throws std::runtime_error for an error that a call of the runtime returned. The runtime keeps errors, too: cleared,
// it is not taken for that of a later call.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ").");
}

// How many blocks fewer a processor holds of a kernel that needs all of its registers: from compute capability 10.0 on
// the compiler takes a few more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFewerBlocks = 1;
#else
constexpr int kFewerBlocks = 0;
#endif

// The unit that a warp works on. `reverse` starts with the last block: its data is what the cache still holds.
struct Place {
  uint32_t unit;
  int lane;
};

__device__ __forceinline__ Place place(bool reverse) {
  const uint32_t block = reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  return {block * kUnitsPerBlock + threadIdx.x / kWarp, static_cast<int>(threadIdx.x % kWarp)};
}

// The dtypes of a unit's tensor, as kernels know them: each kernel exists for lists of one kind, where they are
// constant, and as `AnyTypes` for lists of several. In the former, what is constant for a launch is tested outside of
// the loops.
template <class P, class G, class M = NoRounded>
struct OneType {
  static constexpr bool kConstant = true;
  template <class E, class F>
  static __device__ __forceinline__ void dispatch(const E&, const F& f) {
    f(P{}, G{}, M{});
  }
};

struct AnyTypes {
  static constexpr bool kConstant = false;
  template <class E, class F>
  static __device__ __forceinline__ void dispatch(const E& entry, const F& f) {
    fused_sam::dispatch(entry.dtype(), entry.grad_dtype(), entry.rounded_dtype(), f);
  }
};

// Returns f(types) for the dtypes that a list's tensors have in common if those are usual, else f(AnyTypes{}).
template <class F>
auto with_types(const CommonTypes& types, const F& f) {
  if (types.are(DType::f32, DType::f32)) return f(OneType<float, float>{});
  if (types.are(DType::bf16, DType::bf16)) return f(OneType<bf16, bf16>{});
  if (types.are(DType::f16, DType::f16)) return f(OneType<f16, f16>{});
  if (types.are(DType::f64, DType::f64)) return f(OneType<double, double>{});
  if (types.are(DType::f32, DType::bf16, DType::bf16)) return f(OneType<float, bf16, bf16>{});
  if (types.are(DType::f32, DType::f16, DType::f16)) return f(OneType<float, f16, f16>{});
  return f(AnyTypes{});
}

// The kernel for a list, kernel_for(types, bytes): for the dtypes that its tensors have in common if those are usual,
// and for the smallest arguments that hold it. All others share one kernel, of two sizes.
template <class F>
const void* kernel_of(const CommonTypes& types, size_t list_bytes, const F& kernel_for) {
  const auto of_size = [&](auto common) -> const void* {
    constexpr bool kUsual = decltype(common)::kConstant;
    if (list_bytes <= kSmallPayload) return kernel_for(common, std::integral_constant<int, kSmallPayload>{});
    if constexpr (kUsual && kMediumPayload < kMostPayload) {
      if (list_bytes <= kMediumPayload) return kernel_for(common, std::integral_constant<int, kMediumPayload>{});
    }
    return kernel_for(common, std::integral_constant<int, kMostPayload>{});
  };
  return with_types(types, of_size);
}

// Enqueues a kernel, given as a pointer to a function of Arguments and Terms. The runtime copies both.
template <class Group, class Terms>
void launch(const void* kernel, const Target& target, const WorkList<Group>& list, const Terms& terms,
            const char* what) {
  check(cudaSetDevice(target.device), what);
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&list.arguments())), const_cast<Terms*>(&terms)};
  check(cudaLaunchKernel(kernel, list.blocks(), kThreads, arguments, 0, static_cast<cudaStream_t>(target.stream)),
        what);
}

}  // namespace fused_sam::cuda
