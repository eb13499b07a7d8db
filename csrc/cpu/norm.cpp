// Sum of squares of one block in fp64.
#include "block_kernels.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

// Element i of a block is added to lane i % kLanes, whatever the vector width, and the lanes are added pairwise:
// every instruction set performs the same additions in the same order.
constexpr int kLanes = 32;
constexpr int kVectors = kLanes / VecD::width;

template <class T, class G, bool kAdaptive>
static double sum_of_squares(const G* g, const T* w, int64_t count, double eta) {
  const VecD offset = VecD::set(eta);
  VecD sum[kVectors];
  for (VecD& s : sum) s = VecD::set(0.0);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int k = 0; k < kVectors; ++k) {
      VecD x = VecD::load(g + i + k * VecD::width);
      if (kAdaptive) x = mul(x, add(magnitude(VecD::load(w + i + k * VecD::width)), offset));
      sum[k] = fma(x, x, sum[k]);
    }
  }
  alignas(64) double lanes[kLanes];
  if (i < count) {
    G g_tail[kLanes] = {};
    T w_tail[kLanes] = {};
    for (int64_t k = 0; i + k < count; ++k) {
      g_tail[k] = g[i + k];
      if (kAdaptive) w_tail[k] = w[i + k];
    }
    for (int k = 0; k < kVectors; ++k) {
      VecD x = VecD::load(g_tail + k * VecD::width);
      if (kAdaptive) x = mul(x, add(magnitude(VecD::load(w_tail + k * VecD::width)), offset));
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
  return group.adaptive ? sum_of_squares<T, G, true>(g, w, count, group.eta)
                        : sum_of_squares<T, G, false>(g, w, count, 0.0);
}

double sum_of_squares(const Tensor& t, int64_t begin, int64_t count, const AscentGroup& group) {
  double sum = 0.0;
  dispatch(t.dtype, t.grad_dtype,
           [&](auto p, auto g) { sum = sum_of_squares_as<decltype(p), decltype(g)>(t, begin, count, group); });
  return sum;
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
