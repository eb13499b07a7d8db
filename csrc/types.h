// Data types of the tensors the kernels work on.
#pragma once

#include <cstddef>
#include <cstdint>

// What kernels of the CPU and of CUDA share is compiled for the host by the C++ compiler, and for the device by nvcc.
#if defined(__CUDACC__)
#define FUSED_SAM_HD __device__ __forceinline__
#else
#define FUSED_SAM_HD inline
#endif

namespace fused_sam {

enum class DType : int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// 16-bit storage formats. They are distinct types so that templates can tell them apart.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FUSED_SAM_HD constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Whether a parameter of one type can have a gradient of the other: the same, or fp32 beside a 16-bit type.
FUSED_SAM_HD constexpr bool can_mix(DType param, DType grad) {
  return param == grad || (param == DType::f32 && size_of(grad) == 2) || (grad == DType::f32 && size_of(param) == 2);
}

}  // namespace fused_sam
