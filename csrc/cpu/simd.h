// One vector type per instruction set, and loads and stores that convert every storage type to it.
//
// Each kernel file is compiled once per instruction set into the namespace FUSED_SAM_ISA. All sets give the same bits:
// arithmetic uses the explicit mul and fma below (contraction is off), and conversions round to nearest even.
// These translation units must not instantiate inline functions of the standard library: the linker keeps one copy of
// such a function, and could keep the AVX-512 one for machines that have none.
#pragma once

#include "../types.h"

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace fused_sam::cpu::FUSED_SAM_ISA {

// The type a storage type is computed in: fp64 for fp64, fp32 for everything else.
template <class T>
struct Compute {
  using Vec = VecF;
};
template <>
struct Compute<double> {
  using Vec = VecD;
};

// to <- from, a vector of elements as they are: on the way to fp32 and back a signalling NaN would become a quiet one.
template <bool kStream, class T>
static inline void copy_vector(T* to, const T* from) {
  using Vec = typename Compute<T>::Vec;
  if constexpr (sizeof(T) != 2) {
    kStream ? Vec::load(from).stream(to) : Vec::load(from).store(to);
  } else if constexpr (kStream) {
    Vec::stream_halves(to, from);
  } else {
    __builtin_memcpy(to, from, sizeof(T) * Vec::width);
  }
}

// Copies the `count` < Vec::width elements at a span's end into a full-width buffer and back, so that the
// vector body also computes the tail (same operations, same bits).
template <class T>
struct Tail {
  static constexpr int kWidth = Compute<T>::Vec::width;
  alignas(64) T data[kWidth];

  Tail(const T* from, int64_t count) {
    for (int i = 0; i < kWidth; ++i) data[i] = i < count ? from[i] : T{};
  }
  void store(T* to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) to[i] = data[i];
  }
};

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
