// Arithmetic of integers, and logic of their bits.
#include "integers.h"

#include <algorithm>
#include <type_traits>

#include "opcode.h"

namespace ptx {
namespace {

// Operations by name, so that each is one template argument. 16-bit products are made in 32 unsigned bits.
struct Add {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(a + b);
  }
};
struct Subtract {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(a - b);
  }
};
struct Multiply {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(uint64_t{1} * a * b);
  }
};
struct And {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T of(T a, T b) {
    return a ^ b;
  }
};
struct Min {
  template <class T>
  static T of(T a, T b) {
    return std::min(a, b);
  }
};
struct Max {
  template <class T>
  static T of(T a, T b) {
    return std::max(a, b);
  }
};
struct Divide {
  template <class T>
  static T of(T a, T b) {
    return b == 0 ? T(-1) : static_cast<T>(a / b);
  }
};
struct Remainder {
  template <class T>
  static T of(T a, T b) {
    return b == 0 ? a : static_cast<T>(a % b);
  }
};
struct MultiplyHigh {
  template <class T>
  static T of(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
  }
};
struct Not {
  template <class T>
  static T of(T a) {
    return static_cast<T>(~a);
  }
};
struct Negate {
  template <class T>
  static T of(T a) {
    return static_cast<T>(0 - a);
  }
};
struct Absolute {
  template <class T>
  static T of(T a) {
    return a < 0 ? static_cast<T>(-a) : a;
  }
};

template <class T, class Operation>
Step unary(Thread& thread, const Instruction& in) {
  set<T>(thread, in.operands[0], Operation::template of<T>(read_integer<T>(thread, in, 1)));
  return Step::next;
}

template <class T, class Operation>
Step binary(Thread& thread, const Instruction& in) {
  set<T>(thread, in.operands[0],
         Operation::template of<T>(read_integer<T>(thread, in, 1), read_integer<T>(thread, in, 2)));
  return Step::next;
}

template <class T>
Step multiply_add(Thread& thread, const Instruction& in) {
  const T product = Multiply::of<T>(read_integer<T>(thread, in, 1), read_integer<T>(thread, in, 2));
  set<T>(thread, in.operands[0], static_cast<T>(product + read_integer<T>(thread, in, 3)));
  return Step::next;
}

// Twice as wide as the factors; mad adds a third operand of that width.
template <class T, class Wide, bool kAdds>
Step multiply_wide(Thread& thread, const Instruction& in) {
  Wide result = static_cast<Wide>(static_cast<Wide>(read_integer<T>(thread, in, 1)) *
                                  static_cast<Wide>(read_integer<T>(thread, in, 2)));
  if (kAdds) result = static_cast<Wide>(uint64_t{0} + result + read_integer<Wide>(thread, in, 3));
  set<Wide>(thread, in.operands[0], result);
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

}  // namespace

Handler decode_integer(Opcode& op, Instruction&) {
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
  return nullptr;
}

}  // namespace ptx
