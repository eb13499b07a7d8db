// AVX2 + FMA + F16C: 8 fp32 or 4 fp64 lanes.
#pragma once

#include <immintrin.h>

#include "../types.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

struct VecF {
  using Scalar = float;
  static constexpr int width = 8;
  __m256 v;

  static VecF set(float x) { return {_mm256_set1_ps(x)}; }
  static VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static VecF load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static VecF load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  void stream(bf16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  void store(f16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16()); }
  void stream(f16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_f16()); }
  // `width` elements of 16 bits, as they are.
  static void stream_halves(void* to, const void* from) {
    _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
  }

 private:
  __m128i to_bf16() const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);  // per 128-bit half
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
  }
  __m128i to_f16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

struct VecD {
  using Scalar = double;
  static constexpr int width = 4;
  __m256d v;

  static VecD set(double x) { return {_mm256_set1_pd(x)}; }
  static VecD load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static VecD load(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
  static VecD load(const bf16* p) {
    const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16)))};
  }
  static VecD load(const f16* p) {
    return {_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void stream(double* p) const { _mm256_stream_pd(p, v); }
};

static inline VecF mul(VecF a, VecF b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
static inline VecD mul(VecD a, VecD b) {
  return {_mm256_mul_pd(a.v, b.v)};
}
static inline VecF add(VecF a, VecF b) {
  return {_mm256_add_ps(a.v, b.v)};
}
static inline VecD add(VecD a, VecD b) {
  return {_mm256_add_pd(a.v, b.v)};
}
static inline VecF magnitude(VecF a) {
  return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)};
}
static inline VecD magnitude(VecD a) {
  return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)};
}
static inline VecF with_sign(VecF a, VecF x) {
  const __m256 zero = _mm256_setzero_ps();
  const __m256 positive = _mm256_and_ps(_mm256_cmp_ps(x.v, zero, _CMP_GT_OQ), a.v);
  const __m256 negative = _mm256_and_ps(_mm256_cmp_ps(x.v, zero, _CMP_LT_OQ), _mm256_sub_ps(zero, a.v));
  return {_mm256_or_ps(positive, negative)};
}
static inline VecD with_sign(VecD a, VecD x) {
  const __m256d zero = _mm256_setzero_pd();
  const __m256d positive = _mm256_and_pd(_mm256_cmp_pd(x.v, zero, _CMP_GT_OQ), a.v);
  const __m256d negative = _mm256_and_pd(_mm256_cmp_pd(x.v, zero, _CMP_LT_OQ), _mm256_sub_pd(zero, a.v));
  return {_mm256_or_pd(positive, negative)};
}
static inline VecF fma(VecF a, VecF b, VecF c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
static inline VecD fma(VecD a, VecD b, VecD c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}
static inline VecF sub(VecF a, VecF b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
static inline VecD sub(VecD a, VecD b) {
  return {_mm256_sub_pd(a.v, b.v)};
}
static inline VecF div(VecF a, VecF b) {
  return {_mm256_div_ps(a.v, b.v)};
}
static inline VecD div(VecD a, VecD b) {
  return {_mm256_div_pd(a.v, b.v)};
}
static inline VecF root(VecF a) {
  return {_mm256_sqrt_ps(a.v)};
}
static inline VecD root(VecD a) {
  return {_mm256_sqrt_pd(a.v)};
}
// NaN where either is; the instruction gives b then.
static inline VecF larger(VecF a, VecF b) {
  return {_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}
// NaN where either is; the instruction gives b then.
static inline VecD larger(VecD a, VecD b) {
  return {_mm256_blendv_pd(_mm256_max_pd(a.v, b.v), a.v, _mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q))};
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
