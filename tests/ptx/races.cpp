#include "races.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

constexpr int kMostReports = 5;  // of a launch

void raise_all(std::map<uint32_t, uint32_t>* to, const std::map<uint32_t, uint32_t>& from) {
  for (const auto& [key, value] : from) {
    uint32_t& mine = (*to)[key];
    mine = std::max(mine, value);
  }
}

void learn(Past* to, const Past& from) {
  to->barriers = std::max(to->barriers, from.barriers);
  raise_all(&to->warps, from.warps);
  raise_all(&to->threads, from.threads);
}

void learn(Known* to, const Known& from) {
  for (const auto& [block, past] : from) learn(&(*to)[block], past);
}

// Whether the block's `seen` counts: a thread has fenced since the barrier that made it common.
bool relies_on_seen(const Thread& thread) {
  return thread.order.fenced_barriers == thread.block->order.barriers;
}

}  // namespace

bool Races::is_ordered(const Stamp& before, const Thread& thread) {
  const uint32_t block = before.block - 1, warp = before.thread / kWarp;
  if (block == thread.block->number) {
    return before.thread == thread.number || before.barriers < thread.block->order.barriers ||
           (warp == thread.warp && before.warp_syncs < thread.order.warp_syncs);
  }
  const auto is_known = [&](const Known& known) {
    const auto found = known.find(block);
    if (found == known.end()) return false;
    const Past& past = found->second;
    if (before.barriers < past.barriers) return true;
    const auto own = past.threads.find(before.thread);
    if (own != past.threads.end() && before.fences < own->second) return true;
    const auto synced = past.warps.find(warp);
    return synced != past.warps.end() && before.warp_syncs < synced->second;
  };
  return is_known(thread.order.acquired) || is_known(thread.block->order.acquired) ||
         (relies_on_seen(thread) && is_known(thread.block->order.seen));
}

void Races::check(const Stamp& before, const Stamp& now, const Thread& thread, const Instruction& in,
                  const char* kinds) {
  if (before.block == 0 || (before.atomic && now.atomic) || is_ordered(before, thread)) return;
  if (found_++ >= kMostReports) return;
  report(thread, in,
         std::string("race, ") + kinds + ": with block " + std::to_string(before.block - 1) + " thread " +
             std::to_string(before.thread) + " at PTX line " + std::to_string(before.line));
}

void Races::touch(const Thread& thread, const Instruction& in, uint64_t address, uint32_t bytes, Access access,
                  const void* written) {
  const bool same = written != nullptr && std::memcmp(written, reinterpret_cast<const void*>(address), bytes) == 0;
  const Stamp now{thread.block->number + 1, thread.number, thread.block->order.barriers, thread.order.warp_syncs,
                  thread.order.fences,      in.line,       access == Access::atomic};
  const uint64_t last = (address + bytes - 1) / kCellBytes;
  for (uint64_t number = address / kCellBytes; number <= last; ++number) {
    auto& page = pages_[number / kPageCells];
    if (page == nullptr) page = std::make_unique<Page>();
    Cell& cell = page->cells[number % kPageCells];
    if (!same) check(cell.write, now, thread, in, access == Access::read ? "read after write" : "write after write");
    if (access != Access::read) {
      for (const Stamp& read : cell.reads) {
        if (!same) check(read, now, thread, in, "write after read");
      }
      cell.write = now;
    }
    if (access != Access::write) {
      if (cell.reads[0].block != now.block || cell.reads[0].thread != now.thread) cell.reads[1] = cell.reads[0];
      cell.reads[0] = now;
    }
  }
}

void Races::fence(Thread* thread) {
  ThreadOrder& order = thread->order;
  ++order.fences;
  learn(&order.acquired, order.seen);
  order.seen.clear();
  order.fenced_barriers = thread->block->order.barriers;
  order.released.barriers = thread->block->order.barriers;
  order.released.warps[thread->warp] = order.warp_syncs;
  order.released.threads[thread->number] = order.fences;
}

void Races::synchronize(Thread* thread, uint64_t address, bool acquire, bool release) {
  if (release) fence(thread);
  Known& here = published_[address];
  learn(acquire ? &thread->order.acquired : &thread->order.seen, here);
  if (thread->order.fences == 0) return;
  learn(&here[thread->block->number], thread->order.released);
  learn(&here, thread->order.acquired);
  learn(&here, thread->block->order.acquired);
  if (relies_on_seen(*thread)) learn(&here, thread->block->order.seen);
}

void Races::meet(Block* block) {
  for (Thread& thread : block->threads) {
    learn(&block->order.acquired, thread.order.acquired);
    if (relies_on_seen(thread)) learn(&block->order.acquired, block->order.seen);
  }
  for (Thread& thread : block->threads) {
    learn(&block->order.seen, thread.order.seen);
    thread.order.acquired.clear();
    thread.order.seen.clear();
  }
  ++block->order.barriers;
}

void Races::meet(Thread* const* lanes, uint32_t count) {
  uint32_t syncs = 0;
  Known acquired, seen;
  for (uint32_t k = 0; k < count; ++k) {
    syncs = std::max(syncs, lanes[k]->order.warp_syncs);
    learn(&acquired, lanes[k]->order.acquired);
    learn(&seen, lanes[k]->order.seen);
  }
  for (uint32_t k = 0; k < count; ++k) {
    lanes[k]->order.warp_syncs = syncs + 1;
    lanes[k]->order.acquired = acquired;
    lanes[k]->order.seen = seen;
  }
}

void Races::forget(uint64_t address, uint64_t bytes) {
  for (uint64_t number = address / kCellBytes; number <= (address + bytes) / kCellBytes; ++number) {
    const auto page = pages_.find(number / kPageCells);
    if (page != pages_.end()) page->second->cells[number % kPageCells] = Cell();
  }
}

}  // namespace ptx
