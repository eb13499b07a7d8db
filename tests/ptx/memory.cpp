// ld and st, and what every access is checked for.
#include "memory.h"

#include "opcode.h"

namespace ptx {
namespace {

std::map<uint64_t, uint64_t>& registered() {
  static std::map<uint64_t, uint64_t> ranges;  // begin -> end
  return ranges;
}

bool is_inside(uint64_t address, uint32_t bytes, const void* begin, uint64_t size) {
  const auto first = reinterpret_cast<uint64_t>(begin);
  return address >= first && address + bytes <= first + size;
}

bool is_registered(const Thread& thread, uint64_t address, uint32_t bytes) {
  auto range = registered().upper_bound(address);
  if (range != registered().begin()) {
    --range;
    if (address + bytes <= range->second) return true;
  }
  for (const auto& [name, variable] : thread.block->grid->module->variables) {
    if (is_inside(address, bytes, reinterpret_cast<const void*>(variable.address), variable.size)) return true;
  }
  return false;
}

bool is_in_a_frame(const Thread& thread, uint64_t address, uint32_t bytes) {
  if (is_inside(address, bytes, thread.frame.memory, thread.frame.function->frame)) return true;
  for (const Frame& frame : thread.callers) {
    if (is_inside(address, bytes, frame.memory, frame.function->frame)) return true;
  }
  return false;
}

std::string size_and_place(uint32_t bytes, uint64_t address) {
  char text[64];
  std::snprintf(text, sizeof(text), "%u bytes at %#llx", bytes, static_cast<unsigned long long>(address));
  return text;
}

char* refuse(const Thread& thread, const Instruction& in, const std::string& what) {
  report(thread, in, what);
  return nullptr;
}

}  // namespace

void register_memory(uint64_t address, uint64_t bytes) {
  if (bytes == 0) return;
  auto& ranges = registered();
  uint64_t begin = address, end = address + bytes;
  auto next = ranges.lower_bound(begin);
  if (next != ranges.begin() && std::prev(next)->second > begin) --next;
  // What overlaps becomes one range; what only touches stays apart, so that no access reaches over both.
  while (next != ranges.end() && next->first < end) {
    begin = std::min(begin, next->first);
    end = std::max(end, next->second);
    next = ranges.erase(next);
  }
  ranges[begin] = end;
}

void forget_memory() {
  registered().clear();
}

char* memory_at(Thread& thread, const Instruction& in, const Operand& operand, uint32_t bytes, Access access,
                const void* written) {
  const Block& block = *thread.block;
  const Grid& grid = *block.grid;
  uint64_t address = address_of(thread, operand);
  if (in.space == Space::shared) {
    address = static_cast<uint32_t>(address);
    if (address + bytes > block.shared_bytes) return refuse(thread, in, "shared memory out of bounds");
    address += reinterpret_cast<uint64_t>(block.shared);
  }
  const auto place = reinterpret_cast<char*>(address);
  if (address % bytes != 0) return refuse(thread, in, "misaligned: " + size_and_place(bytes, address));
  const bool is_generic = in.space == Space::generic;
  if ((is_generic || in.space == Space::param) &&
      is_inside(address, bytes, grid.parameters, grid.function->parameter_bytes)) {
    return access == Access::read ? place : refuse(thread, in, "parameters of a kernel are written");
  }
  if (is_generic || in.space == Space::param || in.space == Space::local) {
    if (is_in_a_frame(thread, address, bytes)) return place;
    if (!is_generic) return refuse(thread, in, "local memory out of bounds");
  }
  const bool is_shared = in.space == Space::shared || is_inside(address, bytes, block.shared, block.shared_bytes);
  constexpr uint64_t kNullPage = 65536;
  if (address < kNullPage) return refuse(thread, in, "null: " + size_and_place(bytes, address));
  if (!is_shared && settings.bounds && !is_registered(thread, address, bytes)) {
    const char* kind = access == Access::read ? "read" : "write";
    return refuse(thread, in, std::string(kind) + " out of bounds: " + size_and_place(bytes, address));
  }
  if (grid.races != nullptr) grid.races->touch(thread, in, address, bytes, access, written);
  return place;
}

namespace {

template <class T>
Step load(Thread& thread, const Instruction& in) {
  const uint32_t width = in.vector_width;
  const char* from = memory_at(thread, in, in.operands[width], sizeof(T) * width, Access::read, nullptr);
  if (from == nullptr) return Step::fault;
  for (uint32_t k = 0; k < width; ++k) {
    T value;
    std::memcpy(&value, from + k * sizeof(T), sizeof(T));
    if (std::is_signed_v<T>) {
      set_extended(thread, in.operands[k], static_cast<int64_t>(value));
    } else {
      set<T>(thread, in.operands[k], value);
    }
  }
  return Step::next;
}

template <class T>
Step store(Thread& thread, const Instruction& in) {
  constexpr uint32_t kMostWidth = 8;
  T values[kMostWidth];
  const uint32_t width = in.vector_width;
  for (uint32_t k = 0; k < width; ++k) values[k] = get<T>(thread, in.operands[1 + k]);
  char* to = memory_at(thread, in, in.operands[0], sizeof(T) * width, Access::write, values);
  if (to == nullptr) return Step::fault;
  std::memcpy(to, values, sizeof(T) * width);
  return Step::next;
}

}  // namespace

Handler decode_memory(Opcode& op, Instruction& in) {
  if (op.is("prefetch")) return nullptr;
  const bool is_load = op.is("ld");
  if (!is_load && !op.is("st")) return nullptr;
  in.space = op.take_space();
  // Hints for caches. Volatile, relaxed and the like are refused: they order more than plain accesses do.
  op.take_any({"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::evict_last", "L1::evict_first", "L1::no_allocate",
               "L1::evict_normal", "L2::128B", "L2::256B", "L2::64B"});
  const int vector = op.take_one_of({"v2", "v4", "v8"});
  if (vector >= 0 && in.vector_width != 2u << vector) return nullptr;
  const bool is_signed = op.type() == Type::s8 || op.type() == Type::s16 || op.type() == Type::s32;
  if (is_load && is_signed) {
    return op.type() == Type::s8 ? load<int8_t> : op.type() == Type::s16 ? load<int16_t> : load<int32_t>;
  }
  switch (size_of(op.type())) {
    case 1: return is_load ? load<uint8_t> : store<uint8_t>;
    case 2: return is_load ? load<uint16_t> : store<uint16_t>;
    case 4: return is_load ? load<uint32_t> : store<uint32_t>;
    case 8: return is_load ? load<uint64_t> : store<uint64_t>;
    default: return nullptr;
  }
}

}  // namespace ptx
