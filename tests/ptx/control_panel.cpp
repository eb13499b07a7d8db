// For the tests, which call it with ctypes: settings, memory, reports, and kernels that are not nvcc's.
#include <cstring>

#include "machine.h"
#include "runtime.h"

using namespace ptx;

extern "C" {

void emulator_configure(uint64_t seed, uint32_t resident, uint32_t quantum, bool shuffle, bool races, bool bounds) {
  settings = {seed, resident, quantum, shuffle, races, bounds};
}
void emulator_check_bounds(bool bounds) {
  settings.bounds = bounds;
}
void emulator_register(uint64_t address, uint64_t bytes) {
  register_memory(address, bytes);
}
void emulator_forget() {
  forget_memory();
}
void emulator_set_driver(int version) {
  runtime.driver_version = version;
}
void emulator_fail_after(int64_t good) {
  runtime.good_launches = good;
}
// From here on launches are kept, as in the capture of a graph, until false; each replay then makes them all, one by
// one or together.
void emulator_capture(bool captures) {
  if (captures) runtime.graph.clear();
  runtime.captures = captures;
}
bool emulator_replay(bool together) {
  return run_all(runtime.graph, together);
}
// All PTX that is loaded from here on goes through it.
void emulator_edit(const char* (*editor)(const char*)) {
  runtime.editor = editor;
}

// One report or kernel a line; for as long as no other is asked for.
const char* emulator_reports() {
  static std::string text;
  text.clear();
  for (const std::string& one : reports()) text += one + "\n";
  reports().clear();
  return text.c_str();
}
const char* emulator_launches() {
  static std::string text;
  text.clear();
  for (const auto& [name, count] : runtime.launches) text += std::to_string(count) + " " + name + "\n";
  return text.c_str();
}

const void* emulator_load(const char* text, const char* name) {
  const Module* module = load(text);
  if (module == nullptr) return nullptr;
  const auto found = module->numbers.find(name);
  if (found == module->numbers.end()) return nullptr;
  return new Kernel{module, module->functions[found->second].get()};
}
// Where parameters lie: pairs of offset and size. The number of them.
uint32_t emulator_parameters(const Kernel* kernel, uint32_t* places, uint32_t most) {
  uint32_t count = 0;
  for (const Parameter& parameter : kernel->function->parameters) {
    if (count == most) break;
    places[2 * count] = parameter.offset;
    places[2 * count + 1] = parameter.size;
    ++count;
  }
  return count;
}
bool emulator_launch(const Kernel* kernel, const uint32_t* blocks, uint32_t threads, uint32_t shared,
                     const char* arguments) {
  const Function& function = *kernel->function;
  const Size grid{blocks[0], blocks[1], blocks[2]}, block{threads, 1, 1};
  if (!is_valid(function, grid, block)) return false;
  const std::shared_ptr<char> parameters = parameter_buffer(function);
  std::memcpy(parameters.get(), arguments, function.parameter_bytes);
  return run_all({{*kernel, grid, block, shared, parameters}}, false);
}

}  // extern "C"
