// What the CUDA runtime's stand-in, and the tests, ask of the emulator.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
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
// A launch that was captured into a graph, with its parameters.
struct Recorded {
  Kernel kernel;
  Size blocks, threads;
  size_t dynamic_shared;
  std::vector<char> parameters;
};

struct RuntimeState {
  int driver_version = 13000;
  bool captures = false;
  std::vector<Recorded> graph;
  int64_t good_launches = -1;  // before one that fails; negative: all are good
  std::vector<std::pair<std::string, std::string>> edits;
  uint64_t edited = 0;
  std::map<std::string, uint64_t> launches;  // by kernel
};
extern RuntimeState runtime;

// Null after a report of what is not understood.
Module* load(const std::string& text);
bool is_valid(const Function& function, const Size& blocks, const Size& threads);
// False where the grid was stopped by a fault. `parameters` are aligned to 64 bytes.
bool launch(const Kernel& kernel, const Size& blocks, const Size& threads, size_t dynamic_shared,
            const char* parameters);

}  // namespace ptx
