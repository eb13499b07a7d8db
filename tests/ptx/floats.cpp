// Arithmetic of fp32 and fp64. Approximations (.approx, .full) run at full precision.
#include "opcode.h"
#include "values.h"

namespace ptx {
namespace {

template <class T>
T read(const Thread& thread, const Instruction& in, int which) {
  const T value = get<T>(thread, in.operands[which]);
  return in.flush ? flushed(value) : value;
}

template <class T>
Step finish(Thread& thread, const Instruction& in, T value) {
  value = canonical(value);
  if (in.flush) value = flushed(value);
  if (in.saturate) value = value > T(0) ? (value < T(1) ? value : T(1)) : T(0);  // NaN becomes 0
  set<T>(thread, in.operands[0], value);
  return Step::next;
}

// Operations by name, so that each is one template argument.
struct Add {
  template <class T>
  static T of(T a, T b) {
    return a + b;
  }
};
struct Subtract {
  template <class T>
  static T of(T a, T b) {
    return a - b;
  }
};
struct Multiply {
  template <class T>
  static T of(T a, T b) {
    return a * b;
  }
};
struct Divide {
  template <class T>
  static T of(T a, T b) {
    return a / b;
  }
};
struct Root {
  template <class T>
  static T of(T a) {
    return std::sqrt(a);
  }
};
struct Reciprocal {
  template <class T>
  static T of(T a) {
    return T(1) / a;
  }
};
struct ReciprocalRoot {
  template <class T>
  static T of(T a) {
    return T(1) / std::sqrt(a);
  }
};
struct Power2 {
  template <class T>
  static T of(T a) {
    return std::exp2(a);
  }
};
struct Logarithm2 {
  template <class T>
  static T of(T a) {
    return std::log2(a);
  }
};

template <class T, class Operation>
Step unary(Thread& thread, const Instruction& in) {
  return finish<T>(thread, in, Operation::template of<T>(read<T>(thread, in, 1)));
}

template <class T, class Operation>
Step binary(Thread& thread, const Instruction& in) {
  return finish<T>(thread, in, Operation::template of<T>(read<T>(thread, in, 1), read<T>(thread, in, 2)));
}

template <class T>
Step fused(Thread& thread, const Instruction& in) {
  return finish<T>(thread, in, std::fma(read<T>(thread, in, 1), read<T>(thread, in, 2), read<T>(thread, in, 3)));
}

// These three move bits: a NaN stays the one it was.
template <class T>
Step negate(Thread& thread, const Instruction& in) {
  set<T>(thread, in.operands[0], -read<T>(thread, in, 1));
  return Step::next;
}
template <class T>
Step absolute(Thread& thread, const Instruction& in) {
  set<T>(thread, in.operands[0], std::fabs(read<T>(thread, in, 1)));
  return Step::next;
}
template <class T>
Step copy_sign(Thread& thread, const Instruction& in) {
  set<T>(thread, in.operands[0], std::copysign(read<T>(thread, in, 2), read<T>(thread, in, 1)));
  return Step::next;
}

template <class T, bool kMax>
Step extreme(Thread& thread, const Instruction& in) {
  const T a = read<T>(thread, in, 1), b = read<T>(thread, in, 2);
  const bool wants_nan = in.option != 0;
  if (a != a || b != b) return finish<T>(thread, in, (a != a) == wants_nan ? a : b);
  if (a == b) return finish<T>(thread, in, std::signbit(a) == kMax ? b : a);  // -0 is below +0
  return finish<T>(thread, in, (a < b) == kMax ? b : a);
}

// rcp.approx.ftz.f64 sees and gives the upper half of its number.
Step rough_reciprocal(Thread& thread, const Instruction& in) {
  constexpr uint64_t kUpper = 0xffffffff00000000;
  const auto a = bits_as<double>(get<uint64_t>(thread, in.operands[1]) & kUpper);
  double inverse = 1.0 / a;
  if (std::fabs(inverse) < 0x1p-1022) inverse = std::copysign(0.0, inverse);
  set<uint64_t>(thread, in.operands[0], bits_as<uint64_t>(inverse) & kUpper);
  return Step::next;
}

template <class T>
Handler decode_as(Opcode& op, Instruction& in) {
  if (op.is("neg")) return negate<T>;
  if (op.is("abs")) return absolute<T>;
  if (op.is("copysign")) return copy_sign<T>;
  if (op.is("min") || op.is("max")) {
    in.option = op.take("NaN");
    return op.is("max") ? extreme<T, true> : extreme<T, false>;
  }
  op.take("rn");
  if (op.is("add")) return binary<T, Add>;
  if (op.is("sub")) return binary<T, Subtract>;
  if (op.is("mul")) return binary<T, Multiply>;
  if (op.is("fma") || op.is("mad")) return fused<T>;
  const bool is_rough = op.take("approx");
  op.take("full");
  if (op.is("div")) return binary<T, Divide>;
  if (op.is("sqrt")) return unary<T, Root>;
  if (op.is("rsqrt")) return unary<T, ReciprocalRoot>;
  if (op.is("rcp")) return is_rough && sizeof(T) == 8 ? rough_reciprocal : unary<T, Reciprocal>;
  if (op.is("ex2")) return unary<T, Power2>;
  if (op.is("lg2")) return unary<T, Logarithm2>;
  return nullptr;
}

}  // namespace

Handler decode_float(Opcode& op, Instruction& in) {
  if (op.type() != Type::f32 && op.type() != Type::f64) return nullptr;
  for (const char* other : {"cvt", "setp", "selp", "ld", "st", "atom", "red", "mov"}) {
    if (op.is(other)) return nullptr;
  }
  in.flush = op.take("ftz");
  in.saturate = op.take("sat");
  return op.type() == Type::f32 ? decode_as<float>(op, in) : decode_as<double>(op, in);
}

}  // namespace ptx
