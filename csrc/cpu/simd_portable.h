// Any machine: arrays that the compiler may vectorise. fma is the C library's where there is no instruction, which is
// slow but gives the bits of the vector paths.
#pragma once

#include "../convert.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

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
  // `width` elements of 16 bits, as they are.
  static void stream_halves(void* to, const void* from) { __builtin_memcpy(to, from, 2 * width); }
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
static inline VecF add(VecF a, VecF b) {
  for (int i = 0; i < VecF::width; ++i) a.v[i] += b.v[i];
  return a;
}
static inline VecF magnitude(VecF a) {
  for (int i = 0; i < VecF::width; ++i) a.v[i] = __builtin_fabsf(a.v[i]);
  return a;
}
static inline VecF with_sign(VecF a, VecF x) {
  for (int i = 0; i < VecF::width; ++i) a.v[i] = x.v[i] > 0 ? a.v[i] : x.v[i] < 0 ? 0 - a.v[i] : 0;
  return a;
}
static inline VecD add(VecD a, VecD b) {
  for (int i = 0; i < VecD::width; ++i) a.v[i] += b.v[i];
  return a;
}
static inline VecD magnitude(VecD a) {
  for (int i = 0; i < VecD::width; ++i) a.v[i] = __builtin_fabs(a.v[i]);
  return a;
}
static inline VecD with_sign(VecD a, VecD x) {
  for (int i = 0; i < VecD::width; ++i) a.v[i] = x.v[i] > 0 ? a.v[i] : x.v[i] < 0 ? 0 - a.v[i] : 0;
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
static inline VecF sub(VecF a, VecF b) {
  for (int i = 0; i < VecF::width; ++i) a.v[i] -= b.v[i];
  return a;
}
static inline VecD sub(VecD a, VecD b) {
  for (int i = 0; i < VecD::width; ++i) a.v[i] -= b.v[i];
  return a;
}
static inline VecF div(VecF a, VecF b) {
  for (int i = 0; i < VecF::width; ++i) a.v[i] /= b.v[i];
  return a;
}
static inline VecD div(VecD a, VecD b) {
  for (int i = 0; i < VecD::width; ++i) a.v[i] /= b.v[i];
  return a;
}
static inline VecF root(VecF a) {
  for (int i = 0; i < VecF::width; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
static inline VecD root(VecD a) {
  for (int i = 0; i < VecD::width; ++i) a.v[i] = __builtin_sqrt(a.v[i]);
  return a;
}
// NaN where either is.
static inline VecF larger(VecF a, VecF b) {
  for (int i = 0; i < VecF::width; ++i) a.v[i] = a.v[i] != a.v[i] || a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
static inline VecD larger(VecD a, VecD b) {
  for (int i = 0; i < VecD::width; ++i) a.v[i] = a.v[i] != a.v[i] || a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
