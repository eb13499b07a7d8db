// Where the rounded 16-bit weights go when a kernel has computed those of the fp32 master.
#pragma once

#include "../arithmetic.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

// Written and never read: `stream` says whether the cache is to be bypassed, where the alignment allows.
template <class M>
class RoundedSpan {
 public:
  RoundedSpan(const Tensor& t, int64_t begin, bool stream)
      : data_(static_cast<M*>(t.rounded) + begin), stream_(stream && reinterpret_cast<uintptr_t>(data_) % 64 == 0) {}

  // A whole vector, from element i on.
  void store(int64_t i, VecF weights) const {
    if (stream_) {
      weights.stream(data_ + i);
    } else {
      weights.store(data_ + i);
    }
  }
  // The first `count` elements of one.
  void store(int64_t i, VecF weights, int64_t count) const {
    M tail[VecF::width];
    weights.store(tail);
    for (int64_t k = 0; k < count; ++k) data_[i + k] = tail[k];
  }

 private:
  M* data_;
  bool stream_;
};

template <>
class RoundedSpan<NoRounded> {
 public:
  RoundedSpan(const Tensor&, int64_t, bool) {}

  template <class Vec>
  void store(int64_t, Vec) const {}
  template <class Vec>
  void store(int64_t, Vec, int64_t) const {}
};

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
