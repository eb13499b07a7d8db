// Hyperparameters as kernels take them: numbers, or where the device finds them.
#pragma once

#include "../convert.h"
#include "../powers.h"
#include "work_list.h"

namespace fused_sam::cuda {

// A hyperparameter: a number, or where the device finds it.
struct Scalar {
  double number;
  const void* device;  // null: `number` holds
  DType dtype;

  FUSED_SAM_HD double read() const {
    if (device == nullptr) return number;
    switch (dtype) {
      case DType::f32: return *static_cast<const float*>(device);
      case DType::f64: return *static_cast<const double*>(device);
      case DType::bf16: return widen(*static_cast<const bf16*>(device));
      case DType::f16: return widen(*static_cast<const f16*>(device));
    }
    return number;
  }
};

struct AscentTerms {
  using Entry = SlimEntry;
  AscentGroup group;
  Scalar rho;  // instead of group.rho
};

struct SgdTerms {
  using Entry = SlimEntry;
  SgdGroup group;
  Scalar lr;  // instead of group.lr
};

struct AdamTerms {
  using Entry = WideEntry;
  AdamGroup group;
  Scalar lr;  // instead of group.lr
};

struct AccumulateTerms {
  using Entry = SlimEntry;
  AccumulateGroup group;
};

}  // namespace fused_sam::cuda
