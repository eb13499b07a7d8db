// w <- backup for one block; where w is a master, rounded <- w.
#include <string.h>

#include "block_kernels.h"
#include "rounded_copy.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

template <class M>
static void round_master(const Tensor& t, int64_t begin, int64_t count, bool stream) {
  const float* w = static_cast<const float*>(t.backup) + begin;
  const RoundedSpan<M> rounded(t, begin, stream);
  int64_t i = 0;
  for (; i + VecF::width <= count; i += VecF::width) rounded.store(i, VecF::load(w + i));
  if (i < count) rounded.store(i, VecF::load(Tail<float>(w + i, count - i).data), count - i);
}

void restore(const Tensor& t, int64_t begin, int64_t count, bool stream) {
  if (t.rounded_dtype == DType::bf16) return round_master<bf16>(t, begin, count, stream);
  if (t.rounded_dtype == DType::f16) return round_master<f16>(t, begin, count, stream);
  const int64_t item = size_of(t.dtype);
  memcpy(static_cast<char*>(t.param) + begin * item, static_cast<const char*>(t.backup) + begin * item,
         static_cast<size_t>(count * item));
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
