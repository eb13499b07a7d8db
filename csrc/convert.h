// Between storage types and fp32, to nearest even: for machines without instructions for it, and for CUDA.
#pragma once

#include <string.h>

#include "types.h"

#if defined(__CUDA_ARCH__)
#include <cuda_fp16.h>
#endif

namespace fused_sam {

FUSED_SAM_HD float from_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}
FUSED_SAM_HD uint32_t to_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

FUSED_SAM_HD float to_float(float x) {
  return x;
}
FUSED_SAM_HD float to_float(bf16 x) {
  return from_bits(static_cast<uint32_t>(x.bits) << 16);
}
FUSED_SAM_HD float to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) {  // infinity, or NaN made quiet
    const uint32_t quiet = magnitude > 0x7c00 ? 0x00400000 : 0;
    return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13 | quiet);
  }
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and is exact, for subnormals too.
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
#endif
}

FUSED_SAM_HD void from_float(float* p, float x) {
  *p = x;
}
FUSED_SAM_HD void from_float(bf16* p, float x) {
  const uint32_t u = to_bits(x);
  const uint32_t rounded = u + 0x7fff + (u >> 16 & 1);
  p->bits = static_cast<uint16_t>((x != x ? u | 0x00400000 : rounded) >> 16);
}
FUSED_SAM_HD void from_float(f16* p, float x) {
#if defined(__CUDA_ARCH__)
  p->bits = __half_as_ushort(__float2half_rn(x));
#else
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
#endif
}

}  // namespace fused_sam
