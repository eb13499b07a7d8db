// A PTX module as the emulator runs it: functions of decoded instructions.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ptx {

enum class Type : uint8_t {
  none,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  b8,
  b16,
  b32,
  b64,
  f16,
  bf16,
  f32,
  f64,
  f16x2,
  bf16x2,
  pred
};
enum class Space : uint8_t { generic, global, shared, local, param, constant };

uint32_t size_of(Type type);
Type type_named(const std::string& name);  // without its dot; none for what is no type

struct Thread;
struct Instruction;
// What a thread does after an instruction. One that waits has said for what in Thread::wait.
enum class Step : uint8_t { next, wait, exited, fault };
using Handler = Step (*)(Thread&, const Instruction&);

struct Operand {
  bool is_register = false;
  uint32_t number = 0;  // of the register
  uint64_t value = 0;   // the bits of what is no register
  int64_t offset = 0;   // added to an address
};

// One piece of a call's arguments or results: where it lies in the frames of both functions.
struct Passed {
  uint32_t caller, callee, size;
};

struct Instruction {
  Handler run = nullptr;
  int32_t guard = -1;  // the register of its predicate
  bool negated = false;
  Type type = Type::none, source = Type::none;  // the source differs in conversions
  Space space = Space::generic;
  uint8_t variant = 0, option = 0;  // which of several operations: what their handler makes of them
  bool flush = false, saturate = false;
  bool has_pair = false;                    // d|p: the second operand is a predicate that is written
  uint8_t vector_width = 1, vector_at = 0;  // of the operand in braces, and where its elements begin
  uint8_t count = 0;
  Operand operands[10];
  uint32_t target = 0;  // of a branch; of a call, the number of the function
  std::vector<Passed> arguments, results;
  uint32_t line = 0;
  std::string text;
};

struct Parameter {
  std::string name;
  uint32_t size, offset, align;
};

// Registers are slots of 8 bytes. The first are special: %tid and so on, in the order of special_register().
constexpr uint32_t kSpecials = 32;
constexpr uint32_t kKernelParameters = 20, kFrame = 21, kSink = 22;  // addresses, and what "_" writes to

struct Function {
  std::string name;
  bool is_entry = false;
  std::vector<Parameter> parameters, results;
  uint32_t parameter_bytes = 0;
  std::vector<Instruction> code;
  uint32_t registers = kSpecials;
  uint32_t frame = 0;  // bytes of local memory
  uint32_t most_threads = 0;
};

struct Variable {
  uint64_t address;
  uint32_t size;
};

struct Module {
  std::vector<std::unique_ptr<Function>> functions;
  std::map<std::string, uint32_t> numbers;      // of functions
  std::map<std::string, Variable> variables;    // in global and constant memory
  std::map<std::string, uint32_t> shared;       // offsets
  uint32_t shared_bytes = 0;                    // without the dynamic part, which lies behind
  std::vector<std::unique_ptr<char[]>> memory;  // of the variables
};

// Throws std::runtime_error with the line and what is not understood there.
std::unique_ptr<Module> parse(const std::string& text);

}  // namespace ptx
