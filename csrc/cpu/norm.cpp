// Sum of squares of one block in fp64.
#include "block_kernels.h"
#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

// Element i of a block is added to lane i % kLanes, whatever the vector width, and the lanes are added pairwise:
// every instruction set performs the same additions in the same order.
constexpr int kLanes = 32;
constexpr int kVectors = kLanes / VecD::width;

template <class T, bool kAdaptive>
static double sum_of_squares(const T* g, const T* w, int64_t count) {
  VecD sum[kVectors];
  for (VecD& s : sum) s = VecD::set(0.0);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int k = 0; k < kVectors; ++k) {
      VecD x = VecD::load(g + i + k * VecD::width);
      if (kAdaptive) x = mul(x, VecD::load(w + i + k * VecD::width));
      sum[k] = fma(x, x, sum[k]);
    }
  }
  alignas(64) double lanes[kLanes];
  if (i < count) {
    T g_tail[kLanes] = {}, w_tail[kLanes] = {};
    for (int64_t k = 0; i + k < count; ++k) {
      g_tail[k] = g[i + k];
      if (kAdaptive) w_tail[k] = w[i + k];
    }
    for (int k = 0; k < kVectors; ++k) {
      VecD x = VecD::load(g_tail + k * VecD::width);
      if (kAdaptive) x = mul(x, VecD::load(w_tail + k * VecD::width));
      sum[k] = fma(x, x, sum[k]);
    }
  }
  for (int k = 0; k < kVectors; ++k) sum[k].store(lanes + k * VecD::width);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

template <class T>
static double sum_of_squares_as(const Tensor& t, int64_t begin, int64_t count, bool adaptive) {
  const T* g = static_cast<const T*>(t.grad) + begin;
  const T* w = static_cast<const T*>(t.param) + begin;
  return adaptive ? sum_of_squares<T, true>(g, w, count) : sum_of_squares<T, false>(g, w, count);
}

double sum_of_squares(const Tensor& t, int64_t begin, int64_t count, bool adaptive) {
  switch (t.dtype) {
    case DType::f32: return sum_of_squares_as<float>(t, begin, count, adaptive);
    case DType::f64: return sum_of_squares_as<double>(t, begin, count, adaptive);
    case DType::bf16: return sum_of_squares_as<bf16>(t, begin, count, adaptive);
    case DType::f16: return sum_of_squares_as<f16>(t, begin, count, adaptive);
  }
  return 0.0;
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
