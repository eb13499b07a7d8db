// What nvcc's host code calls of the CUDA runtime, answered by the emulator. A launch is done when its call returns.
#include "runtime.h"

#include <cstring>
#include <stdexcept>

#include "machine.h"

namespace ptx {

RuntimeState runtime;

bool launch(const Kernel& kernel, const Size& blocks, const Size& threads, size_t dynamic_shared,
            const char* parameters) {
  static uint64_t launches = 0;
  Grid grid;
  grid.module = kernel.module;
  grid.function = kernel.function;
  std::memcpy(grid.blocks, &blocks, sizeof(blocks));
  std::memcpy(grid.threads, &threads, sizeof(threads));
  grid.dynamic_shared = static_cast<uint32_t>(dynamic_shared);
  grid.parameters = parameters;
  grid.random.seed(settings.seed * 7919 + launches++);
  if (settings.races) grid.races = std::make_unique<Races>();
  ++runtime.launches[kernel.function->name];
  return run(&grid);
}

bool is_valid(const Function& function, const Size& blocks, const Size& threads) {
  const uint64_t per_block = uint64_t{threads.x} * threads.y * threads.z;
  if (per_block == 0 || per_block > 1024 || uint64_t{blocks.x} * blocks.y * blocks.z == 0) return false;
  return function.most_threads == 0 || per_block <= function.most_threads;
}

// Replaces text in PTX as it is loaded, for the test that defects are found.
std::string edited(std::string text) {
  for (const auto& [from, to] : runtime.edits) {
    for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
      text.replace(at, from.size(), to);
      ++runtime.edited;
    }
  }
  return text;
}

Module* load(const std::string& text) {
  try {
    return parse(edited(text)).release();  // for as long as the process runs
  } catch (const std::runtime_error& error) {
    report(error.what());
    return nullptr;
  }
}

}  // namespace ptx
