#include "opcode.h"

#include <algorithm>
#include <stdexcept>

namespace ptx {
namespace {

struct Named {
  const char* name;
  Type type;
  uint32_t size;
};
constexpr Named kTypes[] = {
    {"u8", Type::u8, 1},       {"u16", Type::u16, 2},       {"u32", Type::u32, 4},   {"u64", Type::u64, 8},
    {"s8", Type::s8, 1},       {"s16", Type::s16, 2},       {"s32", Type::s32, 4},   {"s64", Type::s64, 8},
    {"b8", Type::b8, 1},       {"b16", Type::b16, 2},       {"b32", Type::b32, 4},   {"b64", Type::b64, 8},
    {"f16", Type::f16, 2},     {"bf16", Type::bf16, 2},     {"f32", Type::f32, 4},   {"f64", Type::f64, 8},
    {"f16x2", Type::f16x2, 4}, {"bf16x2", Type::bf16x2, 4}, {"pred", Type::pred, 1},
};

}  // namespace

uint32_t size_of(Type type) {
  for (const Named& known : kTypes) {
    if (known.type == type) return known.size;
  }
  return 0;
}

Type type_named(const std::string& name) {
  for (const Named& known : kTypes) {
    if (name == known.name) return known.type;
  }
  return Type::none;
}

Opcode::Opcode(const std::string& name) : name_(name) {
  size_t begin = 0;
  while (begin <= name.size()) {
    const size_t end = std::min(name.find('.', begin), name.size());
    const std::string part = name.substr(begin, end - begin);
    const Type type = type_named(part);
    if (begin == 0) {
      base_ = part;
    } else if (type != Type::none) {
      types_.push_back(type);
    } else {
      modifiers_.push_back(part);
    }
    begin = end + 1;
  }
}

bool Opcode::take(const char* modifier) {
  const auto found = std::find(modifiers_.begin(), modifiers_.end(), modifier);
  if (found == modifiers_.end()) return false;
  modifiers_.erase(found);
  return true;
}

void Opcode::take_any(std::initializer_list<const char*> modifiers) {
  for (const char* modifier : modifiers) take(modifier);
}

int Opcode::take_one_of(std::initializer_list<const char*> modifiers) {
  int place = 0;
  for (const char* modifier : modifiers) {
    if (take(modifier)) return place;
    ++place;
  }
  return -1;
}

Space Opcode::take_space() {
  if (take("global")) return Space::global;
  if (take("shared") || take("shared::cta")) return Space::shared;
  if (take("local")) return Space::local;
  if (take("param")) return Space::param;
  if (take("const")) return Space::constant;
  return Space::generic;
}

std::string Opcode::left() const {
  std::string all;
  for (const std::string& modifier : modifiers_) all += "." + modifier;
  return all;
}

void decode(const std::string& name, Instruction& in) {
  Opcode op(name);
  in.type = op.type();
  for (const auto decoder : {decode_float, decode_half, decode_integer, decode_bits, decode_predicate, decode_move,
                             decode_conversion, decode_memory, decode_atomic, decode_control, decode_collective}) {
    in.run = decoder(op, in);
    if (in.run != nullptr) break;
  }
  if (in.run == nullptr) throw std::runtime_error("unknown instruction " + name);
  if (!op.left().empty()) throw std::runtime_error("unknown " + op.left() + " of instruction " + name);
}

}  // namespace ptx
