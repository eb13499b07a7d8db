// What instructions of integers share: a handler for each type.
#pragma once

#include "values.h"

namespace ptx {

// The widths are those of registers; b types are taken for unsigned ones. `make` has a value of the type.
template <class Make>
Handler for_integer(Type type, const Make& make) {
  switch (type) {
    case Type::u16:
    case Type::b16: return make(uint16_t{});
    case Type::u32:
    case Type::b32: return make(uint32_t{});
    case Type::u64:
    case Type::b64: return make(uint64_t{});
    case Type::s16: return make(int16_t{});
    case Type::s32: return make(int32_t{});
    case Type::s64: return make(int64_t{});
    default: return nullptr;
  }
}

// For what gives the same bits with and without a sign: C++ leaves the overflow of signed numbers undefined.
inline Type without_sign(Type type) {
  switch (type) {
    case Type::s16: return Type::u16;
    case Type::s32: return Type::u32;
    case Type::s64: return Type::u64;
    default: return type;
  }
}

template <class T>
T read_integer(const Thread& thread, const Instruction& in, int which) {
  return get<T>(thread, in.operands[which]);
}

}  // namespace ptx
