// The name of an instruction, in parts. What no decoder has taken is refused: a modifier may change what happens.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "program.h"

namespace ptx {

class Opcode {
 public:
  explicit Opcode(const std::string& name);

  bool is(const char* base) const { return base_ == base; }
  const std::string& name() const { return name_; }
  // Whether a modifier is there. It is then dealt with.
  bool take(const char* modifier);
  void take_any(std::initializer_list<const char*> modifiers);
  // The place in a list of the modifier that is there, or -1.
  int take_one_of(std::initializer_list<const char*> modifiers);
  Space take_space();
  // The last type, and the one before it.
  Type type() const { return types_.empty() ? Type::none : types_.back(); }
  Type first_type() const { return types_.empty() ? Type::none : types_.front(); }
  size_t types() const { return types_.size(); }
  // What is left, or an empty string.
  std::string left() const;

 private:
  std::string name_, base_;
  std::vector<std::string> modifiers_;
  std::vector<Type> types_;
};

// Each gives the handler of an instruction of its kind and sets what that reads, or null for another kind.
Handler decode_float(Opcode& op, Instruction& in);
Handler decode_half(Opcode& op, Instruction& in);
Handler decode_integer(Opcode& op, Instruction& in);
Handler decode_bits(Opcode& op, Instruction& in);
Handler decode_predicate(Opcode& op, Instruction& in);
Handler decode_move(Opcode& op, Instruction& in);
Handler decode_conversion(Opcode& op, Instruction& in);
Handler decode_memory(Opcode& op, Instruction& in);
Handler decode_atomic(Opcode& op, Instruction& in);
Handler decode_control(Opcode& op, Instruction& in);
Handler decode_collective(Opcode& op, Instruction& in);

// Throws std::runtime_error that names an instruction which is not known.
void decode(const std::string& name, Instruction& in);

}  // namespace ptx
