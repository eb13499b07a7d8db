// mov, also between a register and the parts of a vector, and cvta.
#include "opcode.h"
#include "values.h"

namespace ptx {
namespace {

template <class T>
Step move(Thread& thread, const Instruction& in) {
  set<T>(thread, in.operands[0], get<T>(thread, in.operands[1]));
  return Step::next;
}

Step move_address(Thread& thread, const Instruction& in) {
  set<uint64_t>(thread, in.operands[0], address_of(thread, in.operands[1]));
  return Step::next;
}

uint64_t part_mask(int bits) {
  return (uint64_t{1} << bits) - 1;
}

// mov.b32 %r1, {%rs1, %rs2}
Step pack(Thread& thread, const Instruction& in) {
  const int bits = static_cast<int>(8 * size_of(in.type) / in.vector_width);
  uint64_t whole = 0;
  for (int k = 0; k < in.vector_width; ++k) {
    whole |= (raw(thread, in.operands[1 + k]) & part_mask(bits)) << (bits * k);
  }
  set<uint64_t>(thread, in.operands[0], whole);
  return Step::next;
}

// mov.b32 {%rs1, %rs2}, %r1
Step unpack(Thread& thread, const Instruction& in) {
  const int bits = static_cast<int>(8 * size_of(in.type) / in.vector_width);
  const uint64_t whole = raw(thread, in.operands[in.vector_width]);
  for (int k = 0; k < in.vector_width; ++k) {
    set<uint64_t>(thread, in.operands[k], whole >> (bits * k) & part_mask(bits));
  }
  return Step::next;
}

// Addresses are the same in all spaces but the shared one, whose are offsets. The variant tells the direction.
Step convert_address(Thread& thread, const Instruction& in) {
  uint64_t address = address_of(thread, in.operands[1]);
  const auto shared = reinterpret_cast<uint64_t>(thread.block->shared);
  if (in.space == Space::shared) address = in.variant != 0 ? address - shared : address + shared;
  set<uint64_t>(thread, in.operands[0], address);
  return Step::next;
}

}  // namespace

Handler decode_move(Opcode& op, Instruction& in) {
  if (op.is("cvta")) {
    in.variant = op.take("to");
    in.space = op.take_space();
    return convert_address;
  }
  if (!op.is("mov")) return nullptr;
  if (in.vector_width > 1) return in.vector_at > 0 ? pack : unpack;
  const Operand& from = in.operands[1];
  if (from.offset != 0 || (from.is_register && (from.number == kKernelParameters || from.number == kFrame))) {
    return move_address;
  }
  switch (size_of(op.type())) {
    case 1: return move<uint8_t>;
    case 2: return move<uint16_t>;
    case 4: return move<uint32_t>;
    case 8: return move<uint64_t>;
    default: return nullptr;
  }
}

}  // namespace ptx
