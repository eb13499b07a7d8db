// What SGD, Adam and the running mean of gradients share: the restore, and what a lane does after it.
#pragma once

#include "launch.cuh"
#include "rounded_copy.cuh"

namespace fused_sam::cuda {

template <class T>
struct Pointed;
template <class T>
struct Pointed<T*> {
  using type = T;
};
template <class T>
using Pointee = typename Pointed<T>::type;

// What a base step does to this lane's share of w: update(w, source, gradient, rounded), or, with `skip` or without a
// gradient, only the restore.
template <class Types, class E, class F>
__device__ __forceinline__ void descend_unit(const Unit<E>& u, bool skip, int lane, const F& update) {
  Types::dispatch(*u.entry, [&](auto p, auto g, auto m) {
    using P = decltype(p);
    using G = decltype(g);
    P* w = static_cast<P*>(u.entry->param()) + u.begin;
    const P* source = u.entry->backup() != nullptr ? static_cast<const P*>(u.entry->backup()) + u.begin : w;
    const RoundedCopy<P, decltype(m)> rounded(u);
    if (skip || u.entry->grad() == nullptr) return rounded.restore(w, source, u.count, lane);
    update(w, source, static_cast<G*>(u.entry->grad()) + u.begin, rounded);
  });
}

}  // namespace fused_sam::cuda
