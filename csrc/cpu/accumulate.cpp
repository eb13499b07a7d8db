// A running mean of gradients: mean <- mean + weight * (g - mean) for one block.
#include "block_kernels.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

template <class T>
struct Accumulate {
  using Vec = typename Compute<T>::Vec;
  AccumulateMath<Vec> math;

  explicit Accumulate(const AccumulateGroup& group) : math(group) {}

  // g is read before mean is written: they may be the same memory.
  template <bool kStream, class G>
  void operator()(T* mean, const G* grad) const {
    const Vec updated = math(math.first ? Vec::set(0) : Vec::load(mean), Vec::load(grad));
    if (kStream) {
      updated.stream(mean);
    } else {
      updated.store(mean);
    }
  }
};

template <class T, class G>
static void accumulate_as(const Tensor& t, int64_t begin, int64_t count, const AccumulateGroup& group, bool stream) {
  const Accumulate<T> accumulate(group);
  constexpr int kWidth = Accumulate<T>::Vec::width;
  T* mean = static_cast<T*>(t.param) + begin;
  const G* g = static_cast<const G*>(t.grad) + begin;
  int64_t i = 0;
  // A line that is also read must be stored normally: only a mean that begins here is write-only.
  if (stream && group.first && t.param != t.grad && reinterpret_cast<uintptr_t>(mean) % 64 == 0) {
    for (; i + kWidth <= count; i += kWidth) accumulate.template operator()<true>(mean + i, g + i);
  } else {
    for (; i + kWidth <= count; i += kWidth) accumulate.template operator()<false>(mean + i, g + i);
  }
  if (i < count) {
    const int64_t n = count - i;
    const Tail<G> tail_g(g + i, n);
    Tail<T> tail_mean(mean + i, group.first ? 0 : n);
    accumulate.template operator()<false>(tail_mean.data, tail_g.data);
    tail_mean.store(mean + i, n);
  }
}

void accumulate(const Tensor& t, int64_t begin, int64_t count, const AccumulateGroup& group, bool stream) {
  dispatch(t.dtype, t.grad_dtype,
           [&](auto p, auto g) { accumulate_as<decltype(p), decltype(g)>(t, begin, count, group, stream); });
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
