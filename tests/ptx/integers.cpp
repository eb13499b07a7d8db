// Arithmetic of integers and of bits.
#include <algorithm>
#include <type_traits>

#include "opcode.h"
#include "values.h"

namespace ptx {
namespace {

// The widths are those of registers; b types are taken for unsigned ones. `make` has a value of the type.
template <class Make>
Handler for_integer(Type type, const Make& make) {
  switch (type) {
    case Type::u16: case Type::b16: return make(uint16_t{});
    case Type::u32: case Type::b32: return make(uint32_t{});
    case Type::u64: case Type::b64: return make(uint64_t{});
    case Type::s16: return make(int16_t{});
    case Type::s32: return make(int32_t{});
    case Type::s64: return make(int64_t{});
    default: return nullptr;
  }
}

// For what gives the same bits with and without a sign: C++ leaves the overflow of signed numbers undefined.
Type without_sign(Type type) {
  switch (type) {
    case Type::s16: return Type::u16;
    case Type::s32: return Type::u32;
    case Type::s64: return Type::u64;
    default: return type;
  }
}

template <class T>
T read(const Thread& thread, const Instruction& in, int which) {
  return get<T>(thread, in.operands[which]);
}

// Operations by name, so that each is one template argument. 16-bit products are made in 32 unsigned bits.
struct Add { template <class T> static T of(T a, T b) { return static_cast<T>(a + b); } };
struct Subtract { template <class T> static T of(T a, T b) { return static_cast<T>(a - b); } };
struct Multiply { template <class T> static T of(T a, T b) { return static_cast<T>(uint64_t{1} * a * b); } };
struct And { template <class T> static T of(T a, T b) { return a & b; } };
struct Or { template <class T> static T of(T a, T b) { return a | b; } };
struct Xor { template <class T> static T of(T a, T b) { return a ^ b; } };
struct Min { template <class T> static T of(T a, T b) { return std::min(a, b); } };
struct Max { template <class T> static T of(T a, T b) { return std::max(a, b); } };
struct Divide { template <class T> static T of(T a, T b) { return b == 0 ? T(-1) : static_cast<T>(a / b); } };
struct Remainder { template <class T> static T of(T a, T b) { return b == 0 ? a : static_cast<T>(a % b); } };
struct MultiplyHigh {
  template <class T>
  static T of(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
  }
};
struct Not { template <class T> static T of(T a) { return static_cast<T>(~a); } };
struct Negate { template <class T> static T of(T a) { return static_cast<T>(0 - a); } };
struct Absolute { template <class T> static T of(T a) { return a < 0 ? static_cast<T>(-a) : a; } };

template <class T, class Operation>
Step unary(Thread& thread, const Instruction& in) {
  set<T>(thread, in.operands[0], Operation::template of<T>(read<T>(thread, in, 1)));
  return Step::next;
}

template <class T, class Operation>
Step binary(Thread& thread, const Instruction& in) {
  set<T>(thread, in.operands[0], Operation::template of<T>(read<T>(thread, in, 1), read<T>(thread, in, 2)));
  return Step::next;
}

template <class T>
Step multiply_add(Thread& thread, const Instruction& in) {
  const T product = Multiply::of<T>(read<T>(thread, in, 1), read<T>(thread, in, 2));
  set<T>(thread, in.operands[0], static_cast<T>(product + read<T>(thread, in, 3)));
  return Step::next;
}

// Twice as wide as the factors; mad adds a third operand of that width.
template <class T, class Wide, bool kAdds>
Step multiply_wide(Thread& thread, const Instruction& in) {
  Wide result = static_cast<Wide>(static_cast<Wide>(read<T>(thread, in, 1)) * static_cast<Wide>(read<T>(thread, in, 2)));
  if (kAdds) result = static_cast<Wide>(uint64_t{0} + result + read<Wide>(thread, in, 3));
  set<Wide>(thread, in.operands[0], result);
  return Step::next;
}

template <class T>
Step shift_left(Thread& thread, const Instruction& in) {
  const auto by = read<uint32_t>(thread, in, 2);
  const auto value = static_cast<uint64_t>(read<T>(thread, in, 1));
  set<T>(thread, in.operands[0], by >= 8 * sizeof(T) ? T(0) : static_cast<T>(value << by));
  return Step::next;
}

template <class T>
Step shift_right(Thread& thread, const Instruction& in) {
  const auto by = read<uint32_t>(thread, in, 2);
  const T value = read<T>(thread, in, 1);
  const T beyond = std::is_signed_v<T> && value < 0 ? T(-1) : T(0);
  set<T>(thread, in.operands[0], by >= 8 * sizeof(T) ? beyond : static_cast<T>(value >> by));
  return Step::next;
}

template <class T>
Step count_ones(Thread& thread, const Instruction& in) {
  set<uint32_t>(thread, in.operands[0], static_cast<uint32_t>(__builtin_popcountll(read<T>(thread, in, 1))));
  return Step::next;
}

template <class T>
Step count_leading_zeros(Thread& thread, const Instruction& in) {
  const auto value = static_cast<uint64_t>(read<T>(thread, in, 1));
  const int zeros = value == 0 ? 64 : __builtin_clzll(value);
  set<uint32_t>(thread, in.operands[0], static_cast<uint32_t>(zeros) - (64 - 8 * sizeof(T)));
  return Step::next;
}

template <class T>
T low_bits(uint32_t count) {
  return count >= 8 * sizeof(T) ? T(-1) : static_cast<T>((T(1) << count) - 1);
}

template <class T>
Step insert_field(Thread& thread, const Instruction& in) {
  const uint32_t at = read<uint32_t>(thread, in, 3) & 255, length = read<uint32_t>(thread, in, 4) & 255;
  const T mask = at >= 8 * sizeof(T) ? T(0) : static_cast<T>(low_bits<T>(length) << at);
  const T field = at >= 8 * sizeof(T) ? T(0) : static_cast<T>(read<T>(thread, in, 1) << at);
  set<T>(thread, in.operands[0], (field & mask) | (read<T>(thread, in, 2) & ~mask));
  return Step::next;
}

template <class T>
Step extract_field(Thread& thread, const Instruction& in) {
  using Bits = std::make_unsigned_t<T>;
  constexpr uint32_t kWidth = 8 * sizeof(T);
  const auto value = read<Bits>(thread, in, 1);
  const uint32_t at = read<uint32_t>(thread, in, 2) & 255, length = read<uint32_t>(thread, in, 3) & 255;
  Bits field = at >= kWidth ? Bits(0) : static_cast<Bits>((value >> at) & low_bits<Bits>(length));
  const uint32_t top = std::min(at + length - 1, kWidth - 1);
  if (std::is_signed_v<T> && length != 0 && (value >> top & 1) != 0) field |= ~low_bits<Bits>(top + 1 - std::min(at, top + 1));
  set<Bits>(thread, in.operands[0], field);
  return Step::next;
}

// prmt.b32: four bytes of eight; the fourth bit of a selector spreads the byte's sign.
Step permute_bytes(Thread& thread, const Instruction& in) {
  const uint64_t bytes = read<uint32_t>(thread, in, 1) | static_cast<uint64_t>(read<uint32_t>(thread, in, 2)) << 32;
  const auto selectors = read<uint32_t>(thread, in, 3);
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t selector = selectors >> (4 * k) & 15;
    auto byte = static_cast<uint8_t>(bytes >> (8 * (selector & 7)));
    if ((selector & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
    result |= static_cast<uint32_t>(byte) << (8 * k);
  }
  set<uint32_t>(thread, in.operands[0], result);
  return Step::next;
}

// lop3: any function of three bits, as the table of its eight values.
Step look_up_bits(Thread& thread, const Instruction& in) {
  const auto table = read<uint32_t>(thread, in, 4);
  uint32_t result = 0;
  for (uint32_t k = 0; k < 8; ++k) {
    if ((table >> k & 1) == 0) continue;
    uint32_t here = ~0u;
    for (int which = 0; which < 3; ++which) {
      const auto bits = read<uint32_t>(thread, in, 1 + which);
      here &= (k >> (2 - which) & 1) != 0 ? bits : ~bits;
    }
    result |= here;
  }
  set<uint32_t>(thread, in.operands[0], result);
  return Step::next;
}

// shf: 32 of 64 bits. The variant is the direction, the option whether the amount is clamped or wraps.
Step funnel_shift(Thread& thread, const Instruction& in) {
  const uint64_t bits = static_cast<uint64_t>(read<uint32_t>(thread, in, 2)) << 32 | read<uint32_t>(thread, in, 1);
  const auto amount = read<uint32_t>(thread, in, 3);
  const uint32_t by = in.option != 0 ? std::min(amount, 32u) : amount & 31;
  set<uint32_t>(thread, in.operands[0], static_cast<uint32_t>(in.variant != 0 ? bits >> by : bits << by >> 32));
  return Step::next;
}

template <class Operation>
Handler binary_of(Type type) {
  return for_integer(type, [](auto zero) -> Handler { return binary<decltype(zero), Operation>; });
}
template <class Operation>
Handler unary_of(Type type) {
  return for_integer(type, [](auto zero) -> Handler { return unary<decltype(zero), Operation>; });
}

template <bool kAdds>
Handler wide_of(Type type) {
  switch (type) {
    case Type::u16: return multiply_wide<uint16_t, uint32_t, kAdds>;
    case Type::s16: return multiply_wide<int16_t, int32_t, kAdds>;
    case Type::u32: return multiply_wide<uint32_t, uint64_t, kAdds>;
    case Type::s32: return multiply_wide<int32_t, int64_t, kAdds>;
    default: return nullptr;
  }
}

Handler decode_product(Opcode& op) {
  const Type type = op.type();
  const bool adds = op.is("mad");
  if (op.take("wide")) return adds ? wide_of<true>(type) : wide_of<false>(type);
  if (!adds && op.take("hi")) return binary_of<MultiplyHigh>(type);
  if (!op.take("lo")) return nullptr;
  if (!adds) return binary_of<Multiply>(without_sign(type));
  return for_integer(without_sign(type), [](auto zero) -> Handler { return multiply_add<decltype(zero)>; });
}

Handler decode_bits(Opcode& op, Instruction& in) {
  const Type type = op.type();
  const bool is_long = size_of(type) == 8;
  if (op.is("popc")) return is_long ? count_ones<uint64_t> : count_ones<uint32_t>;
  if (op.is("clz")) return is_long ? count_leading_zeros<uint64_t> : count_leading_zeros<uint32_t>;
  if (op.is("bfi")) return is_long ? insert_field<uint64_t> : insert_field<uint32_t>;
  if (op.is("bfe")) {
    return for_integer(type, [](auto zero) -> Handler { return extract_field<decltype(zero)>; });
  }
  if (op.is("prmt")) return permute_bytes;
  if (op.is("lop3")) return look_up_bits;
  if (op.is("shf")) {
    in.variant = op.take("r");
    in.option = op.take("clamp");
    op.take_any({"l", "wrap"});
    return funnel_shift;
  }
  return nullptr;
}

}  // namespace

Handler decode_integer(Opcode& op, Instruction& in) {
  const Type type = op.type(), bits = without_sign(type);
  if (op.is("add")) return binary_of<Add>(bits);
  if (op.is("sub")) return binary_of<Subtract>(bits);
  if (op.is("mul") || op.is("mad")) return decode_product(op);
  if (op.is("div")) return binary_of<Divide>(type);
  if (op.is("rem")) return binary_of<Remainder>(type);
  if (op.is("min")) return binary_of<Min>(type);
  if (op.is("max")) return binary_of<Max>(type);
  if (op.is("and")) return binary_of<And>(type);
  if (op.is("or")) return binary_of<Or>(type);
  if (op.is("xor")) return binary_of<Xor>(type);
  if (op.is("not")) return unary_of<Not>(type);
  if (op.is("neg")) return unary_of<Negate>(bits);
  if (op.is("abs")) return unary_of<Absolute>(type);
  if (op.is("shl")) return for_integer(bits, [](auto zero) -> Handler { return shift_left<decltype(zero)>; });
  if (op.is("shr")) return for_integer(type, [](auto zero) -> Handler { return shift_right<decltype(zero)>; });
  return decode_bits(op, in);
}

}  // namespace ptx
