// The state of a running grid: threads, blocks, and how they are told to run. One thread of the host at a time: the
// emulator has no locks, and what may be touched is known for one op.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "program.h"
#include "races.h"

namespace ptx {

constexpr uint32_t kWarp = 32;

struct Settings {
  uint64_t seed = 0;
  uint32_t resident = 1;  // blocks that are under way together
  uint32_t quantum = 0;   // threads are preempted after 1 to this many instructions; 0: where they wait
  bool shuffle = false;   // blocks and threads in any order
  bool races = false;
  bool bounds = false;  // only memory that was registered may be touched
};
extern Settings settings;

// What threads wait for each other at.
enum class Meeting : uint8_t { none, block, warp, shuffle, vote, reduction };

struct Frame {
  const Function* function = nullptr;
  uint32_t next = 0;  // instruction
  std::unique_ptr<uint64_t[]> registers;
  std::unique_ptr<char[]> memory_owner;
  char* memory = nullptr;
};

struct Block;
struct Thread {
  Frame frame;
  std::vector<Frame> callers;
  uint64_t* registers = nullptr;  // the frame's
  Block* block = nullptr;
  uint32_t number = 0, lane = 0, warp = 0;  // in its block
  bool started = false, exited = false;
  Meeting waits_for = Meeting::none;
  const Instruction* waits_at = nullptr;
  uint32_t mask = 0;  // the lanes that meet
  ThreadOrder order;

  bool ready() const { return !exited && waits_for == Meeting::none; }
};

struct Grid;
struct Block {
  Grid* grid = nullptr;
  uint32_t number = 0, place[3] = {};
  std::vector<Thread> threads;
  uint32_t exited = 0;
  std::unique_ptr<char[]> shared_owner;
  char* shared = nullptr;
  uint32_t shared_bytes = 0;
  BlockOrder order;
};

struct Grid {
  const Module* module = nullptr;
  const Function* function = nullptr;
  uint32_t blocks[3] = {}, threads[3] = {};
  uint32_t dynamic_shared = 0;
  const char* parameters = nullptr;
  std::unique_ptr<Races> races;  // null: not looked for
  std::mt19937_64 random;
};

// Runs all of them, side by side. False where they were stopped by a fault, of which there is a report.
bool run_together(const std::vector<Grid*>& grids);

// Enters and leaves a function.
Frame new_frame(const Function& function);
// Lets threads go on that have all met. Sets *fault where they never can.
bool let_go_on(Block* block, bool* fault);

// Memory that kernels may touch, where bounds are checked.
void register_memory(uint64_t address, uint64_t bytes);
void forget_memory();

// What is wrong with the kernels. Kept until it is taken.
void report(const std::string& what);
void report(const Thread& thread, const Instruction& in, const std::string& what);
std::vector<std::string>& reports();
Step fault(const Thread& thread, const Instruction& in, const std::string& what);

constexpr int kPoison = 0xcd;  // each byte of fresh memory and registers

}  // namespace ptx
