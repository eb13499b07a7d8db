// Sum of squares of one block in fp64.
#include "block_kernels.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

// Element i of a block is added to lane i % kLanes, whatever the vector width, and the lanes are added pairwise:
// every instruction set performs the same additions in the same order.
constexpr int kLanes = 32;
constexpr int kVectors = kLanes / VecD::width;

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
  const Scaling scaling(group);
  VecD sum[kVectors];
  for (VecD& s : sum) s = VecD::set(0.0);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int k = 0; k < kVectors; ++k) {
      const VecD x = scaling.template operator()<kWeighted>(w + i + k * VecD::width, g + i + k * VecD::width);
      sum[k] = fma(x, x, sum[k]);
    }
  }
  alignas(64) double lanes[kLanes];
  if (i < count) {
    G g_tail[kLanes] = {};
    T w_tail[kLanes] = {};
    for (int64_t k = 0; i + k < count; ++k) {
      g_tail[k] = g[i + k];
      if (kWeighted) w_tail[k] = w[i + k];
    }
    for (int k = 0; k < kVectors; ++k) {
      const VecD x = scaling.template operator()<kWeighted>(w_tail + k * VecD::width, g_tail + k * VecD::width);
      sum[k] = fma(x, x, sum[k]);
    }
  }
  for (int k = 0; k < kVectors; ++k) sum[k].store(lanes + k * VecD::width);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
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
