// Restore and SGD step in one pass over one block, and its rounded copy where w is a master.
#include "block_kernels.h"
#include "rounded_copy.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

template <class T>
struct Sgd {
  using Vec = typename Compute<T>::Vec;
  SgdMath<Vec> math;

  explicit Sgd(const SgdScalars& s) : math(s.group, s.grad_multiplier) {}

  template <bool kStream, class G>
  Vec operator()(T* param, const T* source, G* grad, T* buffer) const {
    Vec g = Vec::load(grad), m = Vec::set(0);
    if (math.reads_buffer()) m = Vec::load(buffer);
    const Vec updated = math(Vec::load(source), &g, &m);
    if (math.scaled) g.store(grad);
    if (math.has_momentum) m.store(buffer);
    if (kStream) {
      updated.stream(param);
    } else {
      updated.store(param);
    }
    return updated;
  }
};

template <class T, class G, class M>
static void sgd_update_as(const Tensor& t, int64_t begin, int64_t count, const SgdScalars& s, bool stream) {
  const Sgd<T> sgd(s);
  constexpr int kWidth = Sgd<T>::Vec::width;
  T* w = static_cast<T*>(t.param) + begin;
  const T* source = t.backup ? static_cast<const T*>(t.backup) + begin : w;
  G* g = static_cast<G*>(t.grad) + begin;
  T* m = t.state[0] ? static_cast<T*>(t.state[0]) + begin : nullptr;
  const RoundedSpan<M> rounded(t, begin, stream);
  int64_t i = 0;
  // A line that is also read must be stored normally: only restored weights are write-only.
  const bool write_only = stream && source != w && reinterpret_cast<uintptr_t>(w) % 64 == 0;
  if (write_only) {
    for (; i + kWidth <= count; i += kWidth) {
      rounded.store(i, sgd.template operator()<true>(w + i, source + i, g + i, m ? m + i : m));
    }
  } else {
    for (; i + kWidth <= count; i += kWidth) {
      rounded.store(i, sgd.template operator()<false>(w + i, source + i, g + i, m ? m + i : m));
    }
  }
  if (i < count) {
    const int64_t n = count - i;
    Tail<T> tail_w(source + i, n), tail_source(source + i, n), tail_m(sgd.math.reads_buffer() ? m + i : source + i, n);
    Tail<G> tail_g(g + i, n);
    rounded.store(i, sgd.template operator()<false>(tail_w.data, tail_source.data, tail_g.data, tail_m.data), n);
    tail_w.store(w + i, n);
    if (sgd.math.scaled) tail_g.store(g + i, n);
    if (sgd.math.has_momentum) tail_m.store(m + i, n);
  }
}

void sgd_update(const Tensor& t, int64_t begin, int64_t count, const SgdScalars& s, bool stream) {
  dispatch(t.dtype, t.grad_dtype, t.rounded_dtype, [&](auto p, auto g, auto m) {
    sgd_update_as<decltype(p), decltype(g), decltype(m)>(t, begin, count, s, stream);
  });
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
