// Comparisons, choices, and the logic of predicates.
#include "opcode.h"
#include "values.h"

namespace ptx {
namespace {

enum Comparison : uint8_t { kEqual, kNotEqual, kLess, kAtMost, kGreater, kAtLeast, kOrdered, kUnordered };
// For floats: whether a comparison with NaN holds. Comparisons that end in u do.
constexpr uint8_t kHoldsForNan = 16;

enum Logic : uint8_t { kNone, kAnd, kOr, kXor, kNot, kMove };

bool combine(uint8_t logic, bool a, bool b) {
  switch (logic) {
    case kAnd: return a && b;
    case kOr: return a || b;
    case kXor: return a != b;
    case kNot: return !a;
    default: return a;
  }
}

template <class T>
bool compare(uint8_t how, T a, T b) {
  const bool is_nan = a != a || b != b;
  const auto comparison = static_cast<uint8_t>(how & ~kHoldsForNan);
  if (comparison == kOrdered) return !is_nan;
  if (comparison == kUnordered) return is_nan;
  if (is_nan) return (how & kHoldsForNan) != 0;
  switch (comparison) {
    case kEqual: return a == b;
    case kNotEqual: return a != b;
    case kLess: return a < b;
    case kAtMost: return a <= b;
    case kGreater: return a > b;
    default: return a >= b;
  }
}

// Writes what a comparison gives, and for p|q its opposite, both combined with a third predicate where there is one.
Step write(Thread& thread, const Instruction& in, bool holds) {
  const int first = in.has_pair ? 2 : 1;
  bool opposite = !holds;
  if (in.option != kNone) {
    const bool third = predicate(thread, in, in.operands[first + 2]);
    holds = combine(in.option, holds, third);
    opposite = combine(in.option, opposite, third);
  }
  thread.registers[in.operands[0].number] = holds;
  if (in.has_pair) thread.registers[in.operands[1].number] = opposite;
  return Step::next;
}

template <class T>
Step compare_values(Thread& thread, const Instruction& in) {
  const int first = in.has_pair ? 2 : 1;
  const auto read = [&](int which) {
    const T value = get<T>(thread, in.operands[which]);
    if constexpr (std::is_floating_point_v<T>) return in.flush ? flushed(value) : value;
    return value;
  };
  return write(thread, in, compare<T>(in.variant, read(first), read(first + 1)));
}

Step compare_halves(Thread& thread, const Instruction& in) {
  const int first = in.has_pair ? 2 : 1;
  const auto read = [&](int which) {
    const auto bits = get<uint16_t>(thread, in.operands[which]);
    return in.type == Type::f16 ? half_to_float(bits) : bf16_to_float(bits);
  };
  return write(thread, in, compare<float>(in.variant, read(first), read(first + 1)));
}

template <class T>
Step select(Thread& thread, const Instruction& in) {
  const bool first = predicate(thread, in, in.operands[3]);
  set<T>(thread, in.operands[0], get<T>(thread, in.operands[first ? 1 : 2]));
  return Step::next;
}

Step logic(Thread& thread, const Instruction& in) {
  const bool a = predicate(thread, in, in.operands[1]);
  const bool b = in.count > 2 && predicate(thread, in, in.operands[2]);
  thread.registers[in.operands[0].number] = combine(in.variant, a, b);
  return Step::next;
}

Handler decode_comparison(Opcode& op, Instruction& in) {
  const int how = op.take_one_of({"eq", "ne", "lt", "le", "gt", "ge", "num", "nan", "lo", "ls", "hi", "hs"});
  const int unordered = how >= 0 ? -1 : op.take_one_of({"equ", "neu", "ltu", "leu", "gtu", "geu"});
  if (how < 0 && unordered < 0) return nullptr;
  // lo, ls, hi and hs are lt, le, gt and ge of unsigned numbers.
  in.variant = static_cast<uint8_t>(how >= 8 ? how - 6 : how >= 0 ? how : unordered | kHoldsForNan);
  in.flush = op.take("ftz");
  in.option = static_cast<uint8_t>(op.take_one_of({"and", "or", "xor"}) + 1);
  switch (op.type()) {
    case Type::u16:
    case Type::b16: return compare_values<uint16_t>;
    case Type::u32:
    case Type::b32: return compare_values<uint32_t>;
    case Type::u64:
    case Type::b64: return compare_values<uint64_t>;
    case Type::s16: return compare_values<int16_t>;
    case Type::s32: return compare_values<int32_t>;
    case Type::s64: return compare_values<int64_t>;
    case Type::f32: return compare_values<float>;
    case Type::f64: return compare_values<double>;
    case Type::f16:
    case Type::bf16: return compare_halves;
    default: return nullptr;
  }
}

}  // namespace

Handler decode_predicate(Opcode& op, Instruction& in) {
  if (op.is("setp")) return decode_comparison(op, in);
  if (op.is("selp")) {
    switch (size_of(op.type())) {
      case 2: return select<uint16_t>;
      case 4: return select<uint32_t>;
      case 8: return select<uint64_t>;
      default: return nullptr;
    }
  }
  if (op.type() != Type::pred) return nullptr;
  in.variant = op.is("and") ? kAnd : op.is("or") ? kOr : op.is("xor") ? kXor : op.is("not") ? kNot : kMove;
  return in.variant != kMove || op.is("mov") ? logic : nullptr;
}

}  // namespace ptx
