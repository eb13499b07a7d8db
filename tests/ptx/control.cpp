// Branches, calls and ends.
#include "opcode.h"
#include "values.h"

namespace ptx {

Frame new_frame(const Function& function) {
  Frame frame;
  frame.function = &function;
  frame.registers.reset(new uint64_t[function.registers]);
  std::memset(frame.registers.get() + kSpecials, kPoison, sizeof(uint64_t) * (function.registers - kSpecials));
  constexpr uint32_t kAlign = 64;
  frame.memory_owner.reset(new char[function.frame + kAlign]);
  const auto address = reinterpret_cast<uint64_t>(frame.memory_owner.get());
  frame.memory = frame.memory_owner.get() + (kAlign - address % kAlign) % kAlign;
  std::memset(frame.memory, kPoison, function.frame);
  frame.registers[kFrame] = reinterpret_cast<uint64_t>(frame.memory);
  return frame;
}

namespace {

Step branch(Thread& thread, const Instruction& in) {
  thread.frame.next = in.target;
  return Step::next;
}

Step leave_kernel(Thread&, const Instruction&) {
  return Step::exited;
}

Step trap(Thread& thread, const Instruction& in) {
  return fault(thread, in, "trap");
}

Step call(Thread& thread, const Instruction& in) {
  Frame callee = new_frame(*thread.block->grid->module->functions[in.target]);
  std::memcpy(callee.registers.get(), thread.registers, sizeof(uint64_t) * kFrame);
  for (const Passed& passed : in.arguments) {
    std::memcpy(callee.memory + passed.callee, thread.frame.memory + passed.caller, passed.size);
  }
  thread.callers.push_back(std::move(thread.frame));
  thread.frame = std::move(callee);
  thread.registers = thread.frame.registers.get();
  return Step::next;
}

Step leave_function(Thread& thread, const Instruction&) {
  if (thread.callers.empty()) return Step::exited;
  Frame& caller = thread.callers.back();
  for (const Passed& passed : caller.function->code[caller.next - 1].results) {
    std::memcpy(caller.memory + passed.caller, thread.frame.memory + passed.callee, passed.size);
  }
  thread.frame = std::move(caller);
  thread.callers.pop_back();
  thread.registers = thread.frame.registers.get();
  return Step::next;
}

}  // namespace

Handler decode_control(Opcode& op, Instruction&) {
  op.take("uni");
  if (op.is("bra")) return branch;
  if (op.is("call")) return call;
  if (op.is("ret")) return leave_function;
  if (op.is("exit")) return leave_kernel;
  if (op.is("trap")) return trap;
  return nullptr;
}

}  // namespace ptx
