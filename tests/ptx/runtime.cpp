// What nvcc's host code calls of the CUDA runtime, answered by the emulator. A launch is done when its call returns.
#include "runtime.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "machine.h"

namespace ptx {

RuntimeState runtime;

namespace {

std::unique_ptr<Grid> grid_of(const Launch& launch) {
  static uint64_t launches = 0;
  auto grid = std::make_unique<Grid>();
  grid->module = launch.kernel.module;
  grid->function = launch.kernel.function;
  std::memcpy(grid->blocks, &launch.blocks, sizeof(launch.blocks));
  std::memcpy(grid->threads, &launch.threads, sizeof(launch.threads));
  grid->dynamic_shared = static_cast<uint32_t>(launch.dynamic_shared);
  grid->parameters = launch.parameters.get();
  grid->random.seed(settings.seed * 7919 + launches++);
  if (settings.races) grid->races = std::make_unique<Races>();
  ++runtime.launches[launch.kernel.function->name];
  return grid;
}

}  // namespace

std::shared_ptr<char> parameter_buffer(const Function& function) {
  constexpr size_t kAlign = 64;
  const size_t bytes = (function.parameter_bytes + kAlign) / kAlign * kAlign;
  std::shared_ptr<char> buffer(static_cast<char*>(std::aligned_alloc(kAlign, bytes)), std::free);
  std::memset(buffer.get(), kPoison, bytes);
  return buffer;
}

bool run_all(const std::vector<Launch>& launches, bool together) {
  std::vector<std::unique_ptr<Grid>> grids;
  std::vector<Grid*> side_by_side;
  for (const Launch& launch : launches) {
    side_by_side.push_back(grids.emplace_back(grid_of(launch)).get());
    if (together) continue;
    if (!run_together(side_by_side)) return false;
    side_by_side.clear();
  }
  return run_together(side_by_side);
}

bool is_valid(const Function& function, const Size& blocks, const Size& threads) {
  const uint64_t per_block = uint64_t{threads.x} * threads.y * threads.z;
  if (per_block == 0 || per_block > 1024 || uint64_t{blocks.x} * blocks.y * blocks.z == 0) return false;
  return function.most_threads == 0 || per_block <= function.most_threads;
}

Module* load(const std::string& text) {
  try {
    const std::string edited = runtime.editor == nullptr ? text : runtime.editor(text.c_str());
    return parse(edited).release();  // for as long as the process runs
  } catch (const std::runtime_error& error) {
    report(error.what());
    return nullptr;
  }
}

}  // namespace ptx
