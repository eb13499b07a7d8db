// One lane of a warp: its scalar arithmetic, and its loads and stores of up to 16 bytes.
#pragma once

#include <string.h>

#include <cmath>

#include "../arithmetic.h"
#include "../powers.h"
#include "table.h"

#if defined(__CUDA_ARCH__)
#define FUSED_SAM_UNROLL _Pragma("unroll")
#define FUSED_SAM_ROLLED _Pragma("unroll 1")
#else
#define FUSED_SAM_UNROLL
#define FUSED_SAM_ROLLED
#endif

namespace fused_sam::cuda {

// The counterpart of the CPU's vectors, for AscentMath, SgdMath and AdamMath. Every operation is what IEEE says on
// both sides: the build turns contraction off, and division and square roots are exact by default.
template <class S>
struct Lane {
  using Scalar = S;
  S v;
  static FUSED_SAM_HD Lane set(S x) { return {x}; }
};

template <class S>
FUSED_SAM_HD Lane<S> mul(Lane<S> a, Lane<S> b) {
  return {a.v * b.v};
}
template <class S>
FUSED_SAM_HD Lane<S> add(Lane<S> a, Lane<S> b) {
  return {a.v + b.v};
}
FUSED_SAM_HD Lane<float> magnitude(Lane<float> a) {
  return {::fabsf(a.v)};
}
FUSED_SAM_HD Lane<double> magnitude(Lane<double> a) {
  return {::fabs(a.v)};
}
template <class S>
FUSED_SAM_HD Lane<S> with_sign(Lane<S> a, Lane<S> x) {
  return {x.v > 0 ? a.v : x.v < 0 ? 0 - a.v : 0};
}
FUSED_SAM_HD Lane<float> fma(Lane<float> a, Lane<float> b, Lane<float> c) {
  return {::fmaf(a.v, b.v, c.v)};
}
FUSED_SAM_HD Lane<double> fma(Lane<double> a, Lane<double> b, Lane<double> c) {
  return {::fma(a.v, b.v, c.v)};
}

template <class S>
FUSED_SAM_HD Lane<S> sub(Lane<S> a, Lane<S> b) {
  return {a.v - b.v};
}
template <class S>
FUSED_SAM_HD Lane<S> div(Lane<S> a, Lane<S> b) {
  return {a.v / b.v};
}
FUSED_SAM_HD Lane<float> root(Lane<float> a) {
  return {::sqrtf(a.v)};
}
FUSED_SAM_HD Lane<double> root(Lane<double> a) {
  return {::sqrt(a.v)};
}
// NaN where either is.
template <class S>
FUSED_SAM_HD Lane<S> larger(Lane<S> a, Lane<S> b) {
  return {a.v != a.v || a.v > b.v ? a.v : b.v};
}

// V consecutive elements; at most 16 bytes, read and written by one instruction.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <int V, class T>
FUSED_SAM_HD Pack<T, V> load(const T* p) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const Pack<T, V>*>(p);
#else
  Pack<T, V> pack;
  memcpy(&pack, p, sizeof(pack));
  return pack;
#endif
}

template <int V, class T>
FUSED_SAM_HD void store(T* p, const Pack<T, V>& pack) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
#else
  memcpy(p, &pack, sizeof(pack));
#endif
}

// Elements per access: 16 bytes of the widest of the types.
template <class... T>
FUSED_SAM_HD constexpr int pack_width() {
  size_t widest = 1;
  ((widest = sizeof(T) > widest ? sizeof(T) : widest), ...);
  return static_cast<int>(16 / widest);
}

template <int V, class T>
FUSED_SAM_HD int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % V);
}

// How many elements come before the first at which all pointers are aligned for packs of V; `count` if none is.
template <int V, class T, class... Others>
FUSED_SAM_HD int head_of(int count, const T* p, const Others*... others) {
  const int first = misalignment<V>(p);
  const bool alike = ((misalignment<V>(others) == first) && ...);
  const int head = (V - first) % V;
  return alike && head < count ? head : count;
}

// Calls op.load<W>(i) and then op.finish<W>(i, ...) for this lane's share of [0, count): packs of V where all memory is
// aligned, single elements before and after. Op::kUnroll packs are in flight before the first is used.
template <int V, class Op>
FUSED_SAM_HD void walk(const Op& op, int count, int head, int lane) {
  FUSED_SAM_ROLLED
  for (int i = lane; i < head; i += kWarp) op.template finish<1>(i, op.template load<1>(i));
  constexpr int kUnroll = Op::kUnroll;
  const int packs = (count - head) / V;
  FUSED_SAM_ROLLED
  for (int j = lane; j < packs; j += kWarp * kUnroll) {
    typename Op::template Regs<V> regs[kUnroll];
    FUSED_SAM_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      if (j + k * kWarp < packs) regs[k] = op.template load<V>(head + (j + k * kWarp) * V);
    }
    FUSED_SAM_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      if (j + k * kWarp < packs) op.template finish<V>(head + (j + k * kWarp) * V, regs[k]);
    }
  }
  FUSED_SAM_ROLLED
  for (int i = head + packs * V + lane; i < count; i += kWarp) op.template finish<1>(i, op.template load<1>(i));
}

}  // namespace fused_sam::cuda
