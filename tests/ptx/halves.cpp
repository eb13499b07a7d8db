// fp16 and bf16: their conversions, and their arithmetic, which is exact in fp64 up to one rounding.
#include <algorithm>

#include "opcode.h"
#include "values.h"

namespace ptx {

float bf16_to_float(uint16_t bf16) {
  return bits_as<float>(static_cast<uint32_t>(bf16) << 16);
}

uint16_t float_to_bf16(float value) {
  if (value != value) return 0x7fff;
  const auto bits = bits_as<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | fraction << 13);
  if (exponent != 0) return bits_as<float>(sign | (exponent + 112) << 23 | fraction << 13);
  const float tiny = std::ldexp(static_cast<float>(fraction), -24);
  return sign != 0 ? -tiny : tiny;
}

uint16_t float_to_half(float value) {
  if (value != value) return 0x7fff;
  const auto sign = static_cast<uint16_t>(bits_as<uint32_t>(value) >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) {  // adding brings its last bit to that of the sum, which is rounded there
    return sign | static_cast<uint16_t>(bits_as<uint32_t>(size + 0.5f) - bits_as<uint32_t>(0.5f));
  }
  const auto bits = bits_as<uint32_t>(size);
  return sign | static_cast<uint16_t>((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}

float to_odd(double value) {
  const auto nearest = static_cast<float>(value);
  if (!std::isfinite(nearest) || static_cast<double>(nearest) == value) return nearest;
  const bool beyond = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
  return bits_as<float>((bits_as<uint32_t>(nearest) - (beyond ? 1 : 0)) | 1);
}

namespace {

enum HalfOperation : uint8_t { kAdd, kSubtract, kMultiply, kFma, kNegate, kAbsolute, kMin, kMax };

double compute(const Instruction& in, double a, double b, double c) {
  switch (in.variant) {
    case kAdd: return a + b;
    case kSubtract: return a - b;
    case kMultiply: return a * b;
    case kFma: return std::fma(a, b, c);
    case kNegate: return -a;
    case kAbsolute: return std::fabs(a);
    default: break;
  }
  if (a != a || b != b) return in.option != 0 ? NAN : (a != a ? b : a);
  return in.variant == kMin ? std::min(a, b) : std::max(a, b);
}

Step half_operation(Thread& thread, const Instruction& in) {
  const bool is_fp16 = in.type == Type::f16 || in.type == Type::f16x2;
  const bool is_pair = in.type == Type::f16x2 || in.type == Type::bf16x2;
  uint32_t result = 0;
  for (int k = 0; k < (is_pair ? 2 : 1); ++k) {
    const auto read = [&](int which) -> double {
      if (which >= in.count) return 0.0;
      const auto bits = static_cast<uint16_t>(get<uint32_t>(thread, in.operands[which]) >> (16 * k));
      return is_fp16 ? half_to_float(bits) : bf16_to_float(bits);
    };
    const float value = to_odd(compute(in, read(1), read(2), read(3)));
    result |= static_cast<uint32_t>(is_fp16 ? float_to_half(value) : float_to_bf16(value)) << (16 * k);
  }
  set<uint32_t>(thread, in.operands[0], result);
  return Step::next;
}

}  // namespace

Handler decode_half(Opcode& op, Instruction& in) {
  const Type type = op.type();
  if (type != Type::f16 && type != Type::bf16 && type != Type::f16x2 && type != Type::bf16x2) return nullptr;
  static const char* const names[] = {"add", "sub", "mul", "fma", "neg", "abs", "min", "max"};
  for (uint8_t k = 0; k < 8; ++k) {
    if (!op.is(names[k])) continue;
    op.take("rn");
    in.variant = k;
    in.option = op.take("NaN");
    return half_operation;
  }
  return nullptr;
}

}  // namespace ptx
