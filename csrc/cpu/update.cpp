// Restore and SGD step in one pass over one block.
#include "block_kernels.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

// The operations of torch.optim.SGD's for-loop, in its order: `x.add(y, alpha=a)` is fma(y, a, x) there.
template <class T>
struct Sgd {
  using Vec = typename Compute<T>::Vec;
  using Scalar = typename Compute<T>::Scalar;

  Vec multiplier, sign, weight_decay, momentum, undamped, minus_lr;
  bool scaled, decays, has_momentum, first, nesterov;

  static Vec set(double x) { return Vec::set(static_cast<Scalar>(x)); }

  explicit Sgd(const SgdScalars& s)
      : multiplier(set(s.grad_multiplier)),
        sign(set(s.group.maximize ? -1.0 : 1.0)),
        weight_decay(set(s.group.weight_decay)),
        momentum(set(s.group.momentum)),
        undamped(set(1.0 - s.group.dampening)),
        minus_lr(set(-s.group.lr)),
        scaled(s.grad_multiplier != 1.0),
        decays(s.group.weight_decay != 0.0),
        has_momentum(s.group.momentum != 0.0),
        first(s.group.first),
        nesterov(s.group.nesterov) {}

  template <bool kStream>
  void operator()(T* param, const T* source, T* grad, T* buffer) const {
    const Vec w = Vec::load(source);
    Vec d = Vec::load(grad);
    if (scaled) {
      d = mul(d, multiplier);
      d.store(grad);
    }
    d = mul(d, sign);
    if (decays) d = fma(w, weight_decay, d);
    if (has_momentum) {
      const Vec m = first ? d : fma(d, undamped, mul(Vec::load(buffer), momentum));
      m.store(buffer);
      d = nesterov ? fma(m, momentum, d) : m;
    }
    const Vec updated = fma(d, minus_lr, w);
    if (kStream) {
      updated.stream(param);
    } else {
      updated.store(param);
    }
  }
};

template <class T>
static void sgd_update_as(const Tensor& t, int64_t begin, int64_t count, const SgdScalars& s, bool stream) {
  const Sgd<T> sgd(s);
  constexpr int kWidth = Sgd<T>::Vec::width;
  T* w = static_cast<T*>(t.param) + begin;
  const T* source = t.backup ? static_cast<const T*>(t.backup) + begin : w;
  T* g = static_cast<T*>(t.grad) + begin;
  T* m = t.momentum ? static_cast<T*>(t.momentum) + begin : nullptr;
  int64_t i = 0;
  // A line that is also read must be stored normally: only restored weights are write-only.
  if (stream && t.backup && reinterpret_cast<uintptr_t>(w) % 64 == 0) {
    for (; i + kWidth <= count; i += kWidth) sgd.template operator()<true>(w + i, source + i, g + i, m ? m + i : m);
  } else {
    for (; i + kWidth <= count; i += kWidth) sgd.template operator()<false>(w + i, source + i, g + i, m ? m + i : m);
  }
  if (i < count) {
    const int64_t n = count - i;
    Tail<T> tail_w(source + i, n), tail_source(source + i, n), tail_g(g + i, n),
        tail_m(m && !sgd.first ? m + i : g + i, n);
    sgd.template operator()<false>(tail_w.data, tail_source.data, tail_g.data, tail_m.data);
    tail_w.store(w + i, n);
    if (sgd.scaled) tail_g.store(g + i, n);
    if (m) tail_m.store(m + i, n);
  }
}

void sgd_update(const Tensor& t, int64_t begin, int64_t count, const SgdScalars& s, bool stream) {
  switch (t.dtype) {
    case DType::f32: return sgd_update_as<float>(t, begin, count, s, stream);
    case DType::f64: return sgd_update_as<double>(t, begin, count, s, stream);
    case DType::bf16: return sgd_update_as<bf16>(t, begin, count, s, stream);
    case DType::f16: return sgd_update_as<f16>(t, begin, count, s, stream);
  }
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
