// What each instruction set provides: one function per op that works on one block of one tensor.
#pragma once

#include "../arithmetic.h"

namespace fused_sam::cpu {

struct SgdScalars {
  SgdGroup group;
  double grad_multiplier;
};

struct AdamTerms {
  AdamScalars scalars;
  double grad_multiplier;
};

// Elements [begin, begin + count) of a tensor. `stream`: write-only data bypasses the cache; the caller fences.
struct BlockKernels {
  double (*sum_of_squares)(const Tensor&, int64_t begin, int64_t count, const AscentGroup&);
  void (*perturb)(const Tensor&, int64_t begin, int64_t count, const AscentScalars&, bool stream);
  void (*restore)(const Tensor&, int64_t begin, int64_t count, bool stream);
  void (*accumulate)(const Tensor&, int64_t begin, int64_t count, const AccumulateGroup&, bool stream);
  void (*sgd_update)(const Tensor&, int64_t begin, int64_t count, const SgdScalars&, bool stream);
  void (*adam_update)(const Tensor&, int64_t begin, int64_t count, const AdamTerms&, bool stream);
  void (*stream_copy)(void* dst, const void* src, int64_t bytes);
};

#define FUSED_SAM_DECLARE_ISA(isa)                                                                   \
  namespace isa {                                                                                    \
  double sum_of_squares(const Tensor&, int64_t begin, int64_t count, const AscentGroup&);            \
  void perturb(const Tensor&, int64_t begin, int64_t count, const AscentScalars&, bool stream);      \
  void restore(const Tensor&, int64_t begin, int64_t count, bool stream);                            \
  void accumulate(const Tensor&, int64_t begin, int64_t count, const AccumulateGroup&, bool stream); \
  void sgd_update(const Tensor&, int64_t begin, int64_t count, const SgdScalars&, bool stream);      \
  void adam_update(const Tensor&, int64_t begin, int64_t count, const AdamTerms&, bool stream);      \
  void stream_copy(void* dst, const void* src, int64_t bytes);                                       \
  }
FUSED_SAM_DECLARE_ISA(portable)
FUSED_SAM_DECLARE_ISA(avx2)
FUSED_SAM_DECLARE_ISA(avx512)
#undef FUSED_SAM_DECLARE_ISA

}  // namespace fused_sam::cpu
