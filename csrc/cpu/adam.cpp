// Restore and Adam step in one pass over one block, and its rounded copy where w is a master.
#include "block_kernels.h"
#include "rounded_copy.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

template <class T>
struct Adam {
  using Vec = typename Compute<T>::Vec;
  AdamMath<Vec> math;

  explicit Adam(const AdamTerms& terms) : math(terms.scalars, terms.grad_multiplier) {}

  // `largest` is read and written with amsgrad only.
  template <bool kStream, class G>
  Vec operator()(T* param, const T* source, G* grad, T* mean, T* square, T* largest) const {
    Vec g = Vec::load(grad), m = Vec::set(0), v = m, u = m;
    if (!math.first) {
      m = Vec::load(mean);
      v = Vec::load(square);
      if (math.amsgrad) u = Vec::load(largest);
    }
    const Vec updated = math(Vec::load(source), &g, &m, &v, &u);
    if (math.scaled) g.store(grad);
    m.store(mean);
    v.store(square);
    if (math.amsgrad) u.store(largest);
    if (kStream) {
      updated.stream(param);
    } else {
      updated.store(param);
    }
    return updated;
  }
};

template <class T, class G, class M>
static void adam_update_as(const Tensor& t, int64_t begin, int64_t count, const AdamTerms& terms, bool stream) {
  const Adam<T> adam(terms);
  constexpr int kWidth = Adam<T>::Vec::width;
  T* w = static_cast<T*>(t.param) + begin;
  const T* source = t.backup ? static_cast<const T*>(t.backup) + begin : w;
  G* g = static_cast<G*>(t.grad) + begin;
  T* m = static_cast<T*>(t.state[0]) + begin;
  T* v = static_cast<T*>(t.state[1]) + begin;
  T* u = adam.math.amsgrad ? static_cast<T*>(t.state[2]) + begin : v;  // v: never touched through this
  const RoundedSpan<M> rounded(t, begin, stream);
  int64_t i = 0;
  const bool write_only = stream && source != w && reinterpret_cast<uintptr_t>(w) % 64 == 0;
  if (write_only) {
    for (; i + kWidth <= count; i += kWidth) {
      rounded.store(i, adam.template operator()<true>(w + i, source + i, g + i, m + i, v + i, u + i));
    }
  } else {
    for (; i + kWidth <= count; i += kWidth) {
      rounded.store(i, adam.template operator()<false>(w + i, source + i, g + i, m + i, v + i, u + i));
    }
  }
  if (i < count) {
    const int64_t n = count - i;
    Tail<T> tail_w(source + i, n), tail_source(source + i, n), tail_m(m + i, n), tail_v(v + i, n), tail_u(u + i, n);
    Tail<G> tail_g(g + i, n);
    const auto updated = adam.template operator()<false>(tail_w.data, tail_source.data, tail_g.data, tail_m.data,
                                                         tail_v.data, tail_u.data);
    rounded.store(i, updated, n);
    tail_w.store(w + i, n);
    if (adam.math.scaled) tail_g.store(g + i, n);
    tail_m.store(m + i, n);
    tail_v.store(v + i, n);
    if (adam.math.amsgrad) tail_u.store(u + i, n);
  }
}

void adam_update(const Tensor& t, int64_t begin, int64_t count, const AdamTerms& terms, bool stream) {
  dispatch(t.dtype, t.grad_dtype, t.rounded_dtype, [&](auto p, auto g, auto m) {
    adam_update_as<decltype(p), decltype(g), decltype(m)>(t, begin, count, terms, stream);
  });
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
