// Sum of squares of one block in fp64.
#include "block_kernels.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

// Element i of a block is added to lane i % kLanes, whatever the vector width, and the lanes are added pairwise:
// every instruction set performs the same additions in the same order.
class SquareSum {
 public:
  static constexpr int kLanes = 32;

  SquareSum() {
    for (VecD& s : sum_) s = VecD::set(0.0);
  }

  // The next kLanes elements, of which at(k) has those from k on.
  template <class F>
  void add(const F& at) {
    for (int k = 0; k < kVectors; ++k) {
      const VecD x = at(k * VecD::width);
      sum_[k] = fma(x, x, sum_[k]);
    }
  }

  double total() const {
    alignas(64) double lanes[kLanes];
    for (int k = 0; k < kVectors; ++k) sum_[k].store(lanes + k * VecD::width);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    }
    return lanes[0];
  }

 private:
  static constexpr int kVectors = kLanes / VecD::width;
  VecD sum_[kVectors];
};

// x of one vector of elements. With `kWeighted` it depends on w, which is not read otherwise.
struct Scaling {
  VecD eta, decay;
  bool adaptive, decays;

  explicit Scaling(const AscentGroup& group)
      : eta(VecD::set(group.eta)),
        decay(VecD::set(group.decay)),
        adaptive(group.adaptive),
        decays(group.decay != 0.0) {}

  template <bool kWeighted, class T, class G>
  VecD operator()(const T* weights, const G* gradients) const {
    VecD x = VecD::load(gradients);
    if (!kWeighted) return x;
    const VecD w = VecD::load(weights);
    if (decays) x = fma(w, decay, x);
    return adaptive ? mul(x, add(magnitude(w), eta)) : x;
  }
};

template <class T, class G, bool kWeighted>
static double sum_of_squares(const G* g, const T* w, int64_t count, const AscentGroup& group) {
  constexpr int kLanes = SquareSum::kLanes;
  const Scaling scaling(group);
  SquareSum sum;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    sum.add([&](int k) { return scaling.template operator()<kWeighted>(w + i + k, g + i + k); });
  }
  if (i < count) {
    G g_tail[kLanes] = {};
    T w_tail[kLanes] = {};
    for (int64_t k = 0; i + k < count; ++k) {
      g_tail[k] = g[i + k];
      if (kWeighted) w_tail[k] = w[i + k];
    }
    sum.add([&](int k) { return scaling.template operator()<kWeighted>(w_tail + k, g_tail + k); });
  }
  return sum.total();
}

template <class T, class G>
static double sum_of_squares_as(const Tensor& t, int64_t begin, int64_t count, const AscentGroup& group) {
  const G* g = static_cast<const G*>(t.grad) + begin;
  const T* w = static_cast<const T*>(t.param) + begin;
  return group.reads_weights() ? sum_of_squares<T, G, true>(g, w, count, group)
                               : sum_of_squares<T, G, false>(g, w, count, group);
}

double sum_of_squares(const Tensor& t, int64_t begin, int64_t count, const AscentGroup& group) {
  double sum = 0.0;
  dispatch(t.dtype, t.grad_dtype,
           [&](auto p, auto g) { sum = sum_of_squares_as<decltype(p), decltype(g)>(t, begin, count, group); });
  return sum;
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
