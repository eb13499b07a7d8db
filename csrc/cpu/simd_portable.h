// Any machine: arrays that the compiler may vectorise. fma is the C library's where there is no instruction, which is
// slow but gives the bits of the vector paths.
#pragma once

#include <string.h>

#include "../types.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

static inline float from_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}
static inline uint32_t to_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

static inline float to_float(float x) {
  return x;
}
static inline float to_float(bf16 x) {
  return from_bits(static_cast<uint32_t>(x.bits) << 16);
}
static inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) {  // infinity, or NaN made quiet
    const uint32_t quiet = magnitude > 0x7c00 ? 0x00400000 : 0;
    return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13 | quiet);
  }
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and is exact, for subnormals too.
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}

static inline void from_float(float* p, float x) {
  *p = x;
}
static inline void from_float(bf16* p, float x) {
  const uint32_t u = to_bits(x);
  const uint32_t rounded = u + 0x7fff + (u >> 16 & 1);
  p->bits = static_cast<uint16_t>((x != x ? u | 0x00400000 : rounded) >> 16);
}
static inline void from_float(f16* p, float x) {
  const uint32_t u = to_bits(x);
  const uint32_t sign = u >> 16 & 0x8000;
  const uint32_t magnitude = u & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | (magnitude >> 13 & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {
    // Subnormal in fp16: adding 0.5 aligns the last bit to 2^-24 and lets the adder round to nearest even.
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

struct VecF {
  using Scalar = float;
  static constexpr int width = 8;
  float v[width];

  static VecF set(float x) {
    VecF r;
    for (float& lane : r.v) lane = x;
    return r;
  }
  template <class T>
  static VecF load(const T* p) {
    VecF r;
    for (int i = 0; i < width; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < width; ++i) from_float(p + i, v[i]);
  }
  template <class T>
  void stream(T* p) const {
    store(p);
  }
};

struct VecD {
  using Scalar = double;
  static constexpr int width = 4;
  double v[width];

  static VecD set(double x) {
    VecD r;
    for (double& lane : r.v) lane = x;
    return r;
  }
  static VecD load(const double* p) {
    VecD r;
    for (int i = 0; i < width; ++i) r.v[i] = p[i];
    return r;
  }
  template <class T>
  static VecD load(const T* p) {
    VecD r;
    for (int i = 0; i < width; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  void store(double* p) const {
    for (int i = 0; i < width; ++i) p[i] = v[i];
  }
  void stream(double* p) const { store(p); }
};

static inline VecF mul(VecF a, VecF b) {
  for (int i = 0; i < VecF::width; ++i) a.v[i] *= b.v[i];
  return a;
}
static inline VecD mul(VecD a, VecD b) {
  for (int i = 0; i < VecD::width; ++i) a.v[i] *= b.v[i];
  return a;
}
static inline VecF fma(VecF a, VecF b, VecF c) {
  for (int i = 0; i < VecF::width; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}
static inline VecD fma(VecD a, VecD b, VecD c) {
  for (int i = 0; i < VecD::width; ++i) c.v[i] = __builtin_fma(a.v[i], b.v[i], c.v[i]);
  return c;
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
