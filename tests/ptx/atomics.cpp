// atom, red and fences.
#include "memory.h"
#include "opcode.h"

namespace ptx {
namespace {

enum Operation : uint8_t { kAdd, kIncrement, kDecrement, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompare };
enum Ordering : uint8_t { kRelaxed = 0, kAcquires = 1, kReleases = 2, kIsReduction = 4 };

template <class T>
T apply(uint8_t operation, T old, T b, T c) {
  switch (operation) {
    case kAdd: return static_cast<T>(old + b);
    case kMin: return std::min(old, b);
    case kMax: return std::max(old, b);
    case kExchange: return b;
    case kCompare: return old == b ? c : old;
    default: break;
  }
  if constexpr (std::is_integral_v<T>) {
    switch (operation) {
      case kIncrement: return old >= b ? T(0) : old + 1;
      case kDecrement: return old == 0 || old > b ? b : old - 1;
      case kAnd: return old & b;
      case kOr: return old | b;
      default: return old ^ b;
    }
  }
  return old;
}

// Nobody comes between reading and writing: threads are preempted between instructions.
template <class T>
Step atomic(Thread& thread, const Instruction& in) {
  const int address = (in.option & kIsReduction) != 0 ? 0 : 1;
  char* place = memory_at(thread, in, in.operands[address], sizeof(T), Access::atomic, nullptr);
  if (place == nullptr) return Step::fault;
  if (const auto& races = thread.block->grid->races) {
    races->synchronize(&thread, reinterpret_cast<uint64_t>(place), (in.option & kAcquires) != 0,
                       (in.option & kReleases) != 0);
  }
  T old;
  std::memcpy(&old, place, sizeof(T));
  const auto read = [&](int which) { return which < in.count ? get<T>(thread, in.operands[which]) : T(0); };
  const T result = apply<T>(in.variant, old, read(address + 1), read(address + 2));
  std::memcpy(place, &result, sizeof(T));
  if (address == 1) set<T>(thread, in.operands[0], old);
  return Step::next;
}

Step fence(Thread& thread, const Instruction&) {
  if (thread.block->grid->races != nullptr) Races::fence(&thread);
  return Step::next;
}

// Between the threads of a block the detector asks for barriers.
Step fence_of_block(Thread&, const Instruction&) {
  return Step::next;
}

Handler atomic_of(Type type) {
  switch (type) {
    case Type::u32:
    case Type::b32: return atomic<uint32_t>;
    case Type::u64:
    case Type::b64: return atomic<uint64_t>;
    case Type::s32: return atomic<int32_t>;
    case Type::s64: return atomic<int64_t>;
    case Type::f32: return atomic<float>;
    case Type::f64: return atomic<double>;
    default: return nullptr;
  }
}

}  // namespace

Handler decode_atomic(Opcode& op, Instruction& in) {
  if (op.is("membar") || op.is("fence")) {
    op.take_any({"sc", "acq_rel"});
    const int scope = op.take_one_of({"cta", "gl", "sys", "gpu"});
    return scope < 0 ? nullptr : scope == 0 ? fence_of_block : fence;
  }
  const bool is_reduction = op.is("red");
  if (!is_reduction && !op.is("atom")) return nullptr;
  in.space = op.take_space();
  const int operation = op.take_one_of({"add", "inc", "dec", "min", "max", "and", "or", "xor", "exch", "cas"});
  const int ordering = op.take_one_of({"relaxed", "acquire", "release", "acq_rel"});
  op.take_any({"gpu", "sys"});
  if (operation < 0) return nullptr;
  in.variant = static_cast<uint8_t>(operation);
  in.option = static_cast<uint8_t>(std::max(ordering, 0) | (is_reduction ? kIsReduction : 0));
  return atomic_of(op.type());
}

}  // namespace ptx
