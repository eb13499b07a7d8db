// The fastest plain copy: what the benchmarks call the floor.
#include <string.h>

#include "block_kernels.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

void stream_copy(void* dst, const void* src, int64_t bytes) {
  constexpr int64_t kStep = VecF::width * static_cast<int64_t>(sizeof(float));
  char* to = static_cast<char*>(dst);
  const char* from = static_cast<const char*>(src);
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (; i + kStep <= bytes; i += kStep) {
      VecF::load(reinterpret_cast<const float*>(from + i)).stream(reinterpret_cast<float*>(to + i));
    }
  }
  memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
