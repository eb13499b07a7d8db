// Registers and operands as values, and 16-bit floats as fp32.
#pragma once

#include <cmath>
#include <cstring>

#include "machine.h"

namespace ptx {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline uint64_t raw(const Thread& thread, const Operand& operand) {
  return operand.is_register ? thread.registers[operand.number] : operand.value;
}
inline uint64_t address_of(const Thread& thread, const Operand& operand) {
  return raw(thread, operand) + static_cast<uint64_t>(operand.offset);
}
template <class T>
T get(const Thread& thread, const Operand& operand) {
  const uint64_t bits = raw(thread, operand);
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
template <class T>
void set(Thread& thread, const Operand& operand, T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  thread.registers[operand.number] = bits;
}
inline void set_extended(Thread& thread, const Operand& operand, int64_t value) {
  thread.registers[operand.number] = static_cast<uint64_t>(value);
}

// Predicates are 0 or 1; a register that holds anything else was never written.
inline bool predicate(Thread& thread, const Instruction& in, const Operand& operand) {
  if (!operand.is_register) return operand.value != 0;
  const uint64_t value = raw(thread, operand);
  if (value > 1) report(thread, in, "an undefined predicate is read");
  return value != 0;
}

float half_to_float(uint16_t half);
uint16_t float_to_half(float value);  // to nearest even
float bf16_to_float(uint16_t bf16);
uint16_t float_to_bf16(float value);
// To fp32 so that a second rounding, to fewer bits, gives what one would have: to odd.
float to_odd(double value);

// What the hardware makes of any NaN in fp32.
inline float canonical(float value) {
  return value != value ? bits_as<float>(uint32_t{0x7fffffff}) : value;
}
inline double canonical(double value) {
  return value;
}
inline float flushed(float value) {
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}
inline double flushed(double value) {
  return value;
}

}  // namespace ptx
