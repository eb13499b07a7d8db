// cvt: between integers and floats, each with the rounding that its name says.
#include <algorithm>
#include <limits>

#include "opcode.h"
#include "values.h"

namespace ptx {
namespace {

enum Rounding : uint8_t { kUnsaid, kNearest, kTowardsZero, kNearestInteger, kTruncated, kFloor, kCeiling };

double to_integral(double value, uint8_t rounding) {
  switch (rounding) {
    case kNearestInteger: return std::nearbyint(value);
    case kTruncated: return std::trunc(value);
    case kFloor: return std::floor(value);
    case kCeiling: return std::ceil(value);
    default: return value;
  }
}

// A source: a float as fp64, which holds every one, or an integer.
struct Source {
  bool is_float;
  double number;
  __int128 integer;
};

template <class T>
Source integer_source(const Thread& thread, const Operand& operand) {
  return {false, 0.0, get<T>(thread, operand)};
}

Source read_source(const Thread& thread, const Instruction& in) {
  const Operand& from = in.operands[1];
  switch (in.source) {
    case Type::u8: return integer_source<uint8_t>(thread, from);
    case Type::u16:
    case Type::b16: return integer_source<uint16_t>(thread, from);
    case Type::u32:
    case Type::b32: return integer_source<uint32_t>(thread, from);
    case Type::u64:
    case Type::b64: return integer_source<uint64_t>(thread, from);
    case Type::s8: return integer_source<int8_t>(thread, from);
    case Type::s16: return integer_source<int16_t>(thread, from);
    case Type::s32: return integer_source<int32_t>(thread, from);
    case Type::s64: return integer_source<int64_t>(thread, from);
    case Type::f16: return {true, half_to_float(get<uint16_t>(thread, from)), 0};
    case Type::bf16: return {true, bf16_to_float(get<uint16_t>(thread, from)), 0};
    case Type::f64: return {true, get<double>(thread, from), 0};
    default: break;
  }
  const auto value = get<float>(thread, from);
  return {true, in.flush ? flushed(value) : value, 0};
}

// Floats saturate, and NaN is 0, of fp64 the integer with only its top bit set. Integers wrap unless .sat is said.
template <class T>
Step write_integer(Thread& thread, const Instruction& in, const Source& source) {
  using Limits = std::numeric_limits<T>;
  T result = 0;
  if (!source.is_float) {
    const __int128 kept =
        in.saturate ? std::clamp<__int128>(source.integer, Limits::min(), Limits::max()) : source.integer;
    result = static_cast<T>(kept);
  } else if (source.number != source.number) {
    if (in.source == Type::f64 && sizeof(T) == 8) result = static_cast<T>(uint64_t{1} << 63);
  } else {
    const double integral = to_integral(source.number, in.variant);
    if (integral <= static_cast<double>(Limits::min())) {
      result = Limits::min();
    } else if (integral >= static_cast<double>(Limits::max())) {
      result = Limits::max();
    } else {
      result = static_cast<T>(integral);
    }
  }
  if (std::is_signed_v<T>) {
    set_extended(thread, in.operands[0], result);
  } else {
    set<T>(thread, in.operands[0], result);
  }
  return Step::next;
}

float integer_to_float(__int128 value) {
  return value < 0 ? static_cast<float>(static_cast<int64_t>(value)) : static_cast<float>(static_cast<uint64_t>(value));
}

double integer_to_double(__int128 value) {
  return value < 0 ? static_cast<double>(static_cast<int64_t>(value))
                   : static_cast<double>(static_cast<uint64_t>(value));
}

Step write_float(Thread& thread, const Instruction& in, const Source& source) {
  float value =
      source.is_float ? static_cast<float>(to_integral(source.number, in.variant)) : integer_to_float(source.integer);
  if (in.variant == kTowardsZero && std::fabs(static_cast<double>(value)) > std::fabs(source.number)) {
    value = std::nextafter(value, 0.0f);
  }
  value = canonical(value);
  if (in.flush) value = flushed(value);
  if (in.saturate) value = value > 0.0f ? std::min(value, 1.0f) : 0.0f;
  set<float>(thread, in.operands[0], value);
  return Step::next;
}

Step convert(Thread& thread, const Instruction& in) {
  const Source source = read_source(thread, in);
  switch (in.type) {
    case Type::u8: return write_integer<uint8_t>(thread, in, source);
    case Type::u16:
    case Type::b16: return write_integer<uint16_t>(thread, in, source);
    case Type::u32:
    case Type::b32: return write_integer<uint32_t>(thread, in, source);
    case Type::u64:
    case Type::b64: return write_integer<uint64_t>(thread, in, source);
    case Type::s8: return write_integer<int8_t>(thread, in, source);
    case Type::s16: return write_integer<int16_t>(thread, in, source);
    case Type::s32: return write_integer<int32_t>(thread, in, source);
    case Type::s64: return write_integer<int64_t>(thread, in, source);
    case Type::f32: return write_float(thread, in, source);
    case Type::f64: {
      const double value = source.is_float ? to_integral(source.number, in.variant) : integer_to_double(source.integer);
      set<double>(thread, in.operands[0], value);
      return Step::next;
    }
    default: break;
  }
  const float value = to_odd(source.is_float ? source.number : integer_to_double(source.integer));
  set<uint16_t>(thread, in.operands[0], in.type == Type::f16 ? float_to_half(value) : float_to_bf16(value));
  return Step::next;
}

// cvt.rn.bf16x2.f32 d, a, b: a goes to the upper half.
Step convert_pair(Thread& thread, const Instruction& in) {
  const auto round = [&](int which) -> uint32_t {
    const auto value = get<float>(thread, in.operands[which]);
    return in.type == Type::f16x2 ? float_to_half(value) : float_to_bf16(value);
  };
  set<uint32_t>(thread, in.operands[0], round(1) << 16 | round(2));
  return Step::next;
}

}  // namespace

Handler decode_conversion(Opcode& op, Instruction& in) {
  if (!op.is("cvt") || op.types() != 2) return nullptr;
  in.type = op.first_type();
  in.source = op.type();
  in.variant = static_cast<uint8_t>(op.take_one_of({"rn", "rz", "rni", "rzi", "rmi", "rpi"}) + 1);
  in.flush = op.take("ftz");
  in.saturate = op.take("sat");
  // A direction of its own is known where one rounding is made, from the wider float.
  if (in.variant == kTowardsZero && !(in.type == Type::f32 && in.source == Type::f64)) return nullptr;
  return in.type == Type::f16x2 || in.type == Type::bf16x2 ? convert_pair : convert;
}

}  // namespace ptx
