// AVX-512 F/BW/VL/DQ: 16 fp32 or 8 fp64 lanes.
#pragma once

#include <immintrin.h>

#include "../types.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

struct VecF {
  using Scalar = float;
  static constexpr int width = 16;
  __m512 v;

  static VecF set(float x) { return {_mm512_set1_ps(x)}; }
  static VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static VecF load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static VecF load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void stream(bf16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void store(f16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16()); }
  void stream(f16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_f16()); }
  // `width` elements of 16 bits, as they are.
  static void stream_halves(void* to, const void* from) {
    _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
  }

 private:
  // Integer rounding: the bf16 conversion instruction flushes subnormals, which would change bits.
  __m256i to_bf16() const {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x00400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
  }
  __m256i to_f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

struct VecD {
  using Scalar = double;
  static constexpr int width = 8;
  __m512d v;

  static VecD set(double x) { return {_mm512_set1_pd(x)}; }
  static VecD load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static VecD load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static VecD load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)))};
  }
  static VecD load(const f16* p) {
    return {_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void stream(double* p) const { _mm512_stream_pd(p, v); }
};

static inline VecF mul(VecF a, VecF b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
static inline VecD mul(VecD a, VecD b) {
  return {_mm512_mul_pd(a.v, b.v)};
}
static inline VecF add(VecF a, VecF b) {
  return {_mm512_add_ps(a.v, b.v)};
}
static inline VecD add(VecD a, VecD b) {
  return {_mm512_add_pd(a.v, b.v)};
}
static inline VecF magnitude(VecF a) {
  return {_mm512_abs_ps(a.v)};
}
static inline VecD magnitude(VecD a) {
  return {_mm512_abs_pd(a.v)};
}
static inline VecF with_sign(VecF a, VecF x) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512 positive = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, zero, _CMP_GT_OQ), a.v);
  return {_mm512_mask_sub_ps(positive, _mm512_cmp_ps_mask(x.v, zero, _CMP_LT_OQ), zero, a.v)};
}
static inline VecD with_sign(VecD a, VecD x) {
  const __m512d zero = _mm512_setzero_pd();
  const __m512d positive = _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x.v, zero, _CMP_GT_OQ), a.v);
  return {_mm512_mask_sub_pd(positive, _mm512_cmp_pd_mask(x.v, zero, _CMP_LT_OQ), zero, a.v)};
}
static inline VecF fma(VecF a, VecF b, VecF c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
static inline VecD fma(VecD a, VecD b, VecD c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}
static inline VecF sub(VecF a, VecF b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
static inline VecD sub(VecD a, VecD b) {
  return {_mm512_sub_pd(a.v, b.v)};
}
static inline VecF div(VecF a, VecF b) {
  return {_mm512_div_ps(a.v, b.v)};
}
static inline VecD div(VecD a, VecD b) {
  return {_mm512_div_pd(a.v, b.v)};
}
static inline VecF root(VecF a) {
  return {_mm512_sqrt_ps(a.v)};
}
static inline VecD root(VecD a) {
  return {_mm512_sqrt_pd(a.v)};
}
// NaN where either is; the instruction gives b then.
static inline VecF larger(VecF a, VecF b) {
  return {_mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
}
// NaN where either is; the instruction gives b then.
static inline VecD larger(VecD a, VecD b) {
  return {_mm512_mask_mov_pd(_mm512_max_pd(a.v, b.v), _mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
