// backup <- w, w <- w + e for one block; where w is a master, rounded <- w + e.
#include <string.h>

#include "block_kernels.h"
#include "rounded_copy.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

template <class T>
struct Ascent {
  using Vec = typename Compute<T>::Vec;
  AscentMath<Vec> math;

  explicit Ascent(const AscentScalars& s) : math(s) {}

  // g is read before backup is written: they are the same memory when swapping in place.
  template <bool kStream, class G>
  void operator()(T* param, const G* grad, T* backup) const {
    const Vec perturbed = math(Vec::load(param), Vec::load(grad));
    copy_vector<kStream>(backup, param);
    perturbed.store(param);
  }
};

template <class T, class G>
static void perturb_as(const Tensor& t, int64_t begin, int64_t count, const AscentScalars& s, bool stream) {
  T* w = static_cast<T*>(t.param) + begin;
  const G* g = static_cast<const G*>(t.grad) + begin;
  T* b = static_cast<T*>(t.backup) + begin;
  if (!s.active) {
    memcpy(b, w, static_cast<size_t>(count) * sizeof(T));
    return;
  }
  const Ascent<T> ascent(s);
  constexpr int kWidth = Ascent<T>::Vec::width;
  int64_t i = 0;
  if (stream && t.backup != t.grad && reinterpret_cast<uintptr_t>(b) % 64 == 0) {
    for (; i + kWidth <= count; i += kWidth) ascent.template operator()<true>(w + i, g + i, b + i);
  } else {
    for (; i + kWidth <= count; i += kWidth) ascent.template operator()<false>(w + i, g + i, b + i);
  }
  if (i < count) {
    const int64_t n = count - i;
    Tail<T> tail_w(w + i, n), tail_b(w + i, n);
    const Tail<G> tail_g(g + i, n);
    ascent.template operator()<false>(tail_w.data, tail_g.data, tail_b.data);
    tail_w.store(w + i, n);
    tail_b.store(b + i, n);
  }
}

template <class G, class M>
static void perturb_master(const Tensor& t, int64_t begin, int64_t count, const AscentScalars& s, bool stream) {
  if (!s.active) return;
  const AscentMath<VecF> math(s);
  const float* w = static_cast<const float*>(t.param) + begin;
  const G* g = static_cast<const G*>(t.grad) + begin;
  const RoundedSpan<M> rounded(t, begin, stream);
  int64_t i = 0;
  for (; i + VecF::width <= count; i += VecF::width) rounded.store(i, math(VecF::load(w + i), VecF::load(g + i)));
  if (i < count) {
    const int64_t n = count - i;
    const Tail<float> tail_w(w + i, n);
    const Tail<G> tail_g(g + i, n);
    rounded.store(i, math(VecF::load(tail_w.data), VecF::load(tail_g.data)), n);
  }
}

void perturb(const Tensor& t, int64_t begin, int64_t count, const AscentScalars& s, bool stream) {
  dispatch(t.dtype, t.grad_dtype, t.rounded_dtype, [&](auto p, auto g, auto m) {
    if constexpr (std::is_same<decltype(m), NoRounded>::value) {
      perturb_as<decltype(p), decltype(g)>(t, begin, count, s, stream);
    } else {
      perturb_master<decltype(g), decltype(m)>(t, begin, count, s, stream);
    }
  });
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
