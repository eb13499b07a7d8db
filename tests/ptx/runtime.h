// What the CUDA runtime's stand-in, and the tests, ask of the emulator.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "program.h"

namespace ptx {

struct Kernel {
  const Module* module;
  const Function* function;
};
struct Size {
  unsigned x, y, z;
};
// A launch, with a copy of its parameters.
struct Launch {
  Kernel kernel;
  Size blocks, threads;
  size_t dynamic_shared;
  std::shared_ptr<char> parameters;
};

struct RuntimeState {
  int driver_version = 13000;
  bool captures = false;
  std::vector<Launch> graph;                     // what was launched meanwhile
  int64_t good_launches = -1;                    // before one that fails; negative: all are good
  const char* (*editor)(const char*) = nullptr;  // of PTX as it is loaded: a test puts defects into it
  std::map<std::string, uint64_t> launches;      // by kernel
};
extern RuntimeState runtime;

// Null after a report of what is not understood.
Module* load(const std::string& text);
bool is_valid(const Function& function, const Size& blocks, const Size& threads);
// Room for a kernel's parameters, poisoned.
std::shared_ptr<char> parameter_buffer(const Function& function);
// One by one, or side by side as on streams of their own. False where one was stopped by a fault.
bool run_all(const std::vector<Launch>& launches, bool together);

}  // namespace ptx
