// Shifts, fields and counts of bits, and choices among bytes.
#include <algorithm>
#include <type_traits>

#include "integers.h"
#include "opcode.h"

namespace ptx {
namespace {

template <class T>
Step shift_left(Thread& thread, const Instruction& in) {
  const auto by = read_integer<uint32_t>(thread, in, 2);
  const auto value = static_cast<uint64_t>(read_integer<T>(thread, in, 1));
  set<T>(thread, in.operands[0], by >= 8 * sizeof(T) ? T(0) : static_cast<T>(value << by));
  return Step::next;
}

template <class T>
Step shift_right(Thread& thread, const Instruction& in) {
  const auto by = read_integer<uint32_t>(thread, in, 2);
  const T value = read_integer<T>(thread, in, 1);
  const T beyond = std::is_signed_v<T> && value < 0 ? T(-1) : T(0);
  set<T>(thread, in.operands[0], by >= 8 * sizeof(T) ? beyond : static_cast<T>(value >> by));
  return Step::next;
}

template <class T>
Step count_ones(Thread& thread, const Instruction& in) {
  set<uint32_t>(thread, in.operands[0], static_cast<uint32_t>(__builtin_popcountll(read_integer<T>(thread, in, 1))));
  return Step::next;
}

template <class T>
Step count_leading_zeros(Thread& thread, const Instruction& in) {
  const auto value = static_cast<uint64_t>(read_integer<T>(thread, in, 1));
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
  const uint32_t at = read_integer<uint32_t>(thread, in, 3) & 255, length = read_integer<uint32_t>(thread, in, 4) & 255;
  const T mask = at >= 8 * sizeof(T) ? T(0) : static_cast<T>(low_bits<T>(length) << at);
  const T field = at >= 8 * sizeof(T) ? T(0) : static_cast<T>(read_integer<T>(thread, in, 1) << at);
  set<T>(thread, in.operands[0], (field & mask) | (read_integer<T>(thread, in, 2) & ~mask));
  return Step::next;
}

template <class T>
Step extract_field(Thread& thread, const Instruction& in) {
  using Bits = std::make_unsigned_t<T>;
  constexpr uint32_t kWidth = 8 * sizeof(T);
  const auto value = read_integer<Bits>(thread, in, 1);
  const uint32_t at = read_integer<uint32_t>(thread, in, 2) & 255, length = read_integer<uint32_t>(thread, in, 3) & 255;
  Bits field = at >= kWidth ? Bits(0) : static_cast<Bits>((value >> at) & low_bits<Bits>(length));
  const uint32_t top = std::min(at + length - 1, kWidth - 1);
  if (std::is_signed_v<T> && length != 0 && (value >> top & 1) != 0)
    field |= ~low_bits<Bits>(top + 1 - std::min(at, top + 1));
  set<Bits>(thread, in.operands[0], field);
  return Step::next;
}

// prmt.b32: four bytes of eight; the fourth bit of a selector spreads the byte's sign.
Step permute_bytes(Thread& thread, const Instruction& in) {
  const uint64_t bytes =
      read_integer<uint32_t>(thread, in, 1) | static_cast<uint64_t>(read_integer<uint32_t>(thread, in, 2)) << 32;
  const auto selectors = read_integer<uint32_t>(thread, in, 3);
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
  const auto table = read_integer<uint32_t>(thread, in, 4);
  uint32_t result = 0;
  for (uint32_t k = 0; k < 8; ++k) {
    if ((table >> k & 1) == 0) continue;
    uint32_t here = ~0u;
    for (int which = 0; which < 3; ++which) {
      const auto bits = read_integer<uint32_t>(thread, in, 1 + which);
      here &= (k >> (2 - which) & 1) != 0 ? bits : ~bits;
    }
    result |= here;
  }
  set<uint32_t>(thread, in.operands[0], result);
  return Step::next;
}

// shf: 32 of 64 bits. The variant is the direction, the option whether the amount is clamped or wraps.
Step funnel_shift(Thread& thread, const Instruction& in) {
  const uint64_t bits =
      static_cast<uint64_t>(read_integer<uint32_t>(thread, in, 2)) << 32 | read_integer<uint32_t>(thread, in, 1);
  const auto amount = read_integer<uint32_t>(thread, in, 3);
  const uint32_t by = in.option != 0 ? std::min(amount, 32u) : amount & 31;
  set<uint32_t>(thread, in.operands[0], static_cast<uint32_t>(in.variant != 0 ? bits >> by : bits << by >> 32));
  return Step::next;
}

}  // namespace

Handler decode_bits(Opcode& op, Instruction& in) {
  const Type type = op.type();
  const bool is_long = size_of(type) == 8;
  if (op.is("shl")) {
    return for_integer(without_sign(type), [](auto zero) -> Handler { return shift_left<decltype(zero)>; });
  }
  if (op.is("shr")) return for_integer(type, [](auto zero) -> Handler { return shift_right<decltype(zero)>; });
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

}  // namespace ptx
