// Data types of the tensors the kernels work on, and the type each is computed in.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_sam {

enum class DType : int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// 16-bit storage formats. They are distinct types so that templates can tell them apart.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

}  // namespace fused_sam
