// A detector of races: two accesses of one place, one of them a write, that nothing orders.
//
// What orders accesses: the program of one thread; bar.sync, those of a block; bar.warp.sync, those of a warp; and
// between blocks a fence followed by an atomic operation on one side, an atomic operation on the same place followed by
// a fence on the other. Of the readers of a place only the last two are remembered: a run in another order finds more.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>

namespace ptx {

struct Thread;
struct Block;
struct Instruction;

// How much of a block's past is known: all before a barrier, all of a warp before one of its own, all of a thread
// before a fence.
struct Past {
  uint32_t barriers = 0;
  std::map<uint32_t, uint32_t> warps, threads;
};
using Known = std::map<uint32_t, Past>;  // by block

struct ThreadOrder {
  uint32_t fences = 0, warp_syncs = 0;
  uint32_t fenced_barriers = ~0u;  // the block's barriers at the last fence
  Past released;                   // of its own block, at the last fence
  Known acquired;                  // what it may rely on
  Known seen;                      // by atomic operations; to rely on it takes a fence
};
struct BlockOrder {
  uint32_t barriers = 0;
  Known acquired, seen;  // by any thread before the last barrier
};

enum class Access : uint8_t { read, write, atomic };

class Races {
 public:
  // `written` is what a plain write leaves there: writing what is there already is no race.
  void touch(const Thread& thread, const Instruction& in, uint64_t address, uint32_t bytes, Access access,
             const void* written);
  static void fence(Thread* thread);
  void synchronize(Thread* thread, uint64_t address, bool acquire, bool release);
  static void meet(Block* block);
  static void meet(Thread* const* lanes, uint32_t count);
  // Forgets memory that another block will have.
  void forget(uint64_t address, uint64_t bytes);

 private:
  struct Stamp {
    uint32_t block = 0;  // number + 1; 0: no access yet
    uint32_t thread = 0, barriers = 0, warp_syncs = 0, fences = 0, line = 0;
    bool atomic = false;
  };
  struct Cell {
    Stamp write, reads[2];
  };
  static constexpr uint64_t kCellBytes = 2, kPageCells = 128;
  struct Page {
    Cell cells[kPageCells];
  };

  static bool is_ordered(const Stamp& before, const Thread& thread);
  void check(const Stamp& before, const Stamp& now, const Thread& thread, const Instruction& in, const char* kinds);

  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
  std::map<uint64_t, Known> published_;  // by the place of an atomic operation
  int found_ = 0;
};

}  // namespace ptx
