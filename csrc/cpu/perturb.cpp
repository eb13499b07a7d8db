// backup <- w, w <- w + e for one block.
#include <string.h>

#include "block_kernels.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

template <class T>
struct Ascent {
  using Vec = typename Compute<T>::Vec;
  using Scalar = typename Compute<T>::Scalar;
  Vec pre, post;
  bool adaptive;

  explicit Ascent(const AscentScalars& s)
      : pre(Vec::set(static_cast<Scalar>(s.pre))), post(Vec::set(static_cast<Scalar>(s.post))), adaptive(s.adaptive) {}

  // g is read before backup is written: they are the same memory when swapping in place.
  template <bool kStream>
  void operator()(T* param, const T* grad, T* backup) const {
    const Vec w = Vec::load(param);
    const Vec g = mul(Vec::load(grad), pre);
    const Vec perturbed = adaptive ? fma(w, mul(mul(w, g), post), w) : fma(g, post, w);
    perturbed.store(param);
    if (kStream) {
      w.stream(backup);
    } else {
      w.store(backup);
    }
  }
};

template <class T>
static void perturb_as(const Tensor& t, int64_t begin, int64_t count, const AscentScalars& s, bool stream) {
  T* w = static_cast<T*>(t.param) + begin;
  const T* g = static_cast<const T*>(t.grad) + begin;
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
    Tail<T> tail_w(w + i, n), tail_g(g + i, n), tail_b(w + i, n);
    ascent.template operator()<false>(tail_w.data, tail_g.data, tail_b.data);
    tail_w.store(w + i, n);
    tail_b.store(b + i, n);
  }
}

void perturb(const Tensor& t, int64_t begin, int64_t count, const AscentScalars& s, bool stream) {
  switch (t.dtype) {
    case DType::f32: return perturb_as<float>(t, begin, count, s, stream);
    case DType::f64: return perturb_as<double>(t, begin, count, s, stream);
    case DType::bf16: return perturb_as<bf16>(t, begin, count, s, stream);
    case DType::f16: return perturb_as<f16>(t, begin, count, s, stream);
  }
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
