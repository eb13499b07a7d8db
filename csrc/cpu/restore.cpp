// w <- backup for one block; where w is a master copy, model <- w.
#include <string.h>

#include "block_kernels.h"
#include "model_span.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

template <class M>
static void round_to_model(const Tensor& t, int64_t begin, int64_t count, bool stream) {
  const float* w = static_cast<const float*>(t.backup) + begin;
  const ModelSpan<M> model(t, begin, stream);
  int64_t i = 0;
  for (; i + VecF::width <= count; i += VecF::width) model.store(i, VecF::load(w + i));
  if (i < count) model.store(i, VecF::load(Tail<float>(w + i, count - i).data), count - i);
}

void restore(const Tensor& t, int64_t begin, int64_t count, bool stream) {
  if (t.model_dtype == DType::bf16) return round_to_model<bf16>(t, begin, count, stream);
  if (t.model_dtype == DType::f16) return round_to_model<f16>(t, begin, count, stream);
  const int64_t item = size_of(t.dtype);
  memcpy(static_cast<char*>(t.param) + begin * item, static_cast<const char*>(t.backup) + begin * item,
         static_cast<size_t>(count * item));
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
