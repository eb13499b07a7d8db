// One lane of a warp: its scalar arithmetic, and its loads and stores of up to 16 bytes.
#pragma once

#include <type_traits>

#include "../arithmetic.h"
#include "../powers.h"
#include "work_list.h"

namespace fused_sam::cuda {

// The counterpart of the CPU's vectors, for AscentMath, SgdMath and AdamMath. Every operation is what IEEE says on
// both sides: the build turns contraction off, and division and square roots are exact by default.
template <class S>
struct Lane {
  using Scalar = S;
  S v;
  static __device__ __forceinline__ Lane set(S x) { return {x}; }
};

template <class S>
__device__ __forceinline__ Lane<S> mul(Lane<S> a, Lane<S> b) {
  return {a.v * b.v};
}
template <class S>
__device__ __forceinline__ Lane<S> add(Lane<S> a, Lane<S> b) {
  return {a.v + b.v};
}
__device__ __forceinline__ Lane<float> magnitude(Lane<float> a) {
  return {::fabsf(a.v)};
}
__device__ __forceinline__ Lane<double> magnitude(Lane<double> a) {
  return {::fabs(a.v)};
}
template <class S>
__device__ __forceinline__ Lane<S> with_sign(Lane<S> a, Lane<S> x) {
  return {x.v > 0 ? a.v : x.v < 0 ? 0 - a.v : 0};
}
__device__ __forceinline__ Lane<float> fma(Lane<float> a, Lane<float> b, Lane<float> c) {
  return {::fmaf(a.v, b.v, c.v)};
}
__device__ __forceinline__ Lane<double> fma(Lane<double> a, Lane<double> b, Lane<double> c) {
  return {::fma(a.v, b.v, c.v)};
}

template <class S>
__device__ __forceinline__ Lane<S> sub(Lane<S> a, Lane<S> b) {
  return {a.v - b.v};
}
template <class S>
__device__ __forceinline__ Lane<S> div(Lane<S> a, Lane<S> b) {
  return {a.v / b.v};
}
__device__ __forceinline__ Lane<float> root(Lane<float> a) {
  return {::sqrtf(a.v)};
}
__device__ __forceinline__ Lane<double> root(Lane<double> a) {
  return {::sqrt(a.v)};
}
// NaN where either is.
template <class S>
__device__ __forceinline__ Lane<S> larger(Lane<S> a, Lane<S> b) {
  return {a.v != a.v || a.v > b.v ? a.v : b.v};
}

// V consecutive elements; at most 16 bytes, read and written by one instruction.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}

// The same, one by one where memory is not aligned.
template <int V, bool kAligned, class T>
__device__ __forceinline__ Pack<T, V> load_as(const T* p) {
  Pack<T, V> pack;
  if constexpr (kAligned) {
    pack = load<V>(p);
  } else {
    for (int e = 0; e < V; ++e) pack.v[e] = p[e];
  }
  return pack;
}

template <int V, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Elements per access: 16 bytes of the widest of the types.
template <class... T>
constexpr int pack_width() {
  size_t widest = 1;
  ((widest = sizeof(T) > widest ? sizeof(T) : widest), ...);
  return static_cast<int>(16 / widest);
}

template <int V, class T>
__device__ __forceinline__ int misalignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % V);
}

// How many elements come before the first at which all pointers are aligned for packs of V; `count` if none is.
template <int V, class T, class... Others>
__device__ __forceinline__ int head_of(int count, const T* p, const Others*... others) {
  const int first = misalignment<V>(p);
  const bool alike = ((misalignment<V>(others) == first) && ...);
  const int head = (V - first) % V;
  return alike && head < count ? head : count;
}

// For this lane's share of n packs of V elements calls op.load<V>(i) and then op.finish<V>(i, ...), where i = first(k)
// is the place of the k-th pack. kUnroll packs are in flight before the first is used.
template <int V, int kUnroll, class Op, class First>
__device__ __forceinline__ void in_batches(const Op& op, int n, int lane, const First& first) {
#pragma unroll 1
  for (int j = lane; j < n; j += kWarp * kUnroll) {
    typename Op::template Regs<V> regs[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (j + k * kWarp < n) regs[k] = op.template load<V>(first(j + k * kWarp));
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (j + k * kWarp < n) op.template finish<V>(first(j + k * kWarp), regs[k]);
    }
  }
}

// How [0, count) is walked: in packs of V from `head` on, one by one before and behind them.
template <int V>
struct Path {
  int count, head;

  __device__ __forceinline__ int packs() const { return (count - head) / V; }

  template <class Op, int kUnroll = Op::kUnroll>
  __device__ __forceinline__ void walk_packs(const Op& op, int lane) const {
    const int begin = head;
    in_batches<V, kUnroll>(op, packs(), lane, [begin](int k) { return begin + k * V; });
  }
  template <class Op>
  __device__ __forceinline__ void walk_singles(const Op& op, int lane) const {
    constexpr int kSingles = 4;
    const int before = head, packed = packs() * V;
    in_batches<1, kSingles>(op, count - packed, lane, [before, packed](int k) { return k < before ? k : k + packed; });
  }
};

// The path on which packs are aligned in all memory, or where there is none, all elements one by one.
template <int V, class... T>
__device__ __forceinline__ Path<V> path_of(int count, const T*... memory) {
  return {count, head_of<V>(count, memory...)};
}

template <int V, class Op>
__device__ __forceinline__ void walk(const Path<V>& path, const Op& op, int lane) {
  path.walk_singles(op, lane);
  path.walk_packs(op, lane);
}

// Calls f with `flag`, as a constant if kConstant: f is compiled for both then, and neither tests the flag again.
template <bool kConstant, class F>
__device__ __forceinline__ void settle(bool flag, const F& f) {
  if constexpr (!kConstant) {
    f(flag);
  } else if (flag) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

}  // namespace fused_sam::cuda
