// Where weights go: copies, and the rounded 16-bit weights of fp32 masters.
#pragma once

#include "vector.cuh"

namespace fused_sam::cuda {

// to <- from, rounded where `to` is narrower.
template <class T, class F>
struct Copy {
  static constexpr int kUnroll = 4;
  T* to;
  const F* from;

  template <int V>
  using Regs = Pack<F, V>;
  template <int V>
  __device__ __forceinline__ Pack<F, V> load(int i) const {
    return cuda::load<V>(from + i);
  }
  template <int V>
  __device__ __forceinline__ void finish(int i, const Pack<F, V>& pack) const {
    if constexpr (std::is_same<T, F>::value) {
      cuda::store<V>(to + i, pack);
    } else {
      Pack<T, V> rounded;
      for (int e = 0; e < V; ++e) narrow(&rounded.v[e], widen(pack.v[e]));
      cuda::store<V>(to + i, rounded);
    }
  }
};

template <class T, class F>
__device__ __forceinline__ void copy(T* to, const F* from, int count, int lane) {
  constexpr int V = pack_width<T, F>();
  walk(path_of<V>(count, to, from), Copy<T, F>{to, from}, lane);
}

// What is left to do with a unit's new weights, in memory of type M beside that of type P.
template <class P, class M>
class RoundedCopy {
 public:
  using Type = M;

  template <class E>
  __device__ __forceinline__ explicit RoundedCopy(const Unit<E>& u)
      : rounded_(static_cast<M*>(u.entry->rounded()) + u.begin) {}

  template <int V>
  __device__ __forceinline__ void store(int i, const Pack<P, V>& weights) const {
    Copy<M, P>{rounded_, nullptr}.template finish<V>(i, weights);
  }
  // The master copy is w already.
  __device__ __forceinline__ void restore(P* w, const P*, int count, int lane) const { copy(rounded_, w, count, lane); }
  // What must be aligned as w is.
  __device__ __forceinline__ const M* or_else(const P*) const { return rounded_; }

 private:
  M* rounded_;
};

template <class P>
class RoundedCopy<P, NoRounded> {
 public:
  using Type = NoRounded;

  template <class E>
  __device__ __forceinline__ explicit RoundedCopy(const Unit<E>&) {}

  template <int V>
  __device__ __forceinline__ void store(int, const Pack<P, V>&) const {}
  __device__ __forceinline__ void restore(P* w, const P* source, int count, int lane) const {
    if (source != w) copy(w, source, count, lane);
  }
  __device__ __forceinline__ const P* or_else(const P* w) const { return w; }
};

}  // namespace fused_sam::cuda
