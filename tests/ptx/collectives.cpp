// Where threads meet: shuffles, votes and reductions of a warp's lanes, and barriers of warps and blocks.
#include <algorithm>

#include "opcode.h"
#include "values.h"

namespace ptx {
namespace {

enum Shuffle : uint8_t { kUp, kDown, kButterfly, kIndex };
enum Vote : uint8_t { kAll, kAny, kUniform, kBallot };
enum Reduction : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor };

Step wait(Thread& thread, const Instruction& in, Meeting meeting) {
  thread.waits_for = meeting;
  thread.waits_at = &in;
  // The mask is the last operand.
  thread.mask = meeting == Meeting::block ? 0 : get<uint32_t>(thread, in.operands[in.count - 1]);
  return Step::wait;
}

template <Meeting kMeeting>
Step wait_for(Thread& thread, const Instruction& in) {
  return wait(thread, in, kMeeting);
}

// The lanes of a warp that have met, by lane; null for those outside the mask.
struct Lanes {
  Thread* lane[kWarp] = {};
  uint32_t mask = 0;

  template <class Visit>
  void visit(const Visit& visit_lane) const {
    for (uint32_t k = 0; k < kWarp; ++k) {
      if (lane[k] != nullptr) visit_lane(k, *lane[k]);
    }
  }
};

void shuffle(const Lanes& lanes, const Instruction& in) {
  const int first = in.has_pair ? 2 : 1;
  uint32_t values[kWarp] = {}, taken[kWarp] = {};
  bool is_inside[kWarp] = {};
  lanes.visit([&](uint32_t k, Thread& thread) { values[k] = get<uint32_t>(thread, in.operands[first]); });
  lanes.visit([&](uint32_t k, Thread& thread) {
    const uint32_t by = get<uint32_t>(thread, in.operands[first + 1]) & (kWarp - 1);
    const auto packed = get<uint32_t>(thread, in.operands[first + 2]);
    const uint32_t clamp = packed & 31, segment = packed >> 8 & 31;
    const auto most = static_cast<int>((k & segment) | (clamp & ~segment)), own = static_cast<int>(k);
    int from = 0;
    switch (in.variant) {
      case kUp: from = own - static_cast<int>(by); break;
      case kDown: from = own + static_cast<int>(by); break;
      case kButterfly: from = own ^ static_cast<int>(by); break;
      default: from = static_cast<int>((k & segment) | (by & ~segment)); break;
    }
    is_inside[k] = in.variant == kUp ? from >= most : from <= most;
    if (!is_inside[k]) from = own;
    if (lanes.lane[from] == nullptr) report(thread, in, "a shuffle reads a lane outside its mask");
    taken[k] = values[from];
  });
  lanes.visit([&](uint32_t k, Thread& thread) {
    set<uint32_t>(thread, in.operands[0], taken[k]);
    if (in.has_pair) thread.registers[in.operands[1].number] = is_inside[k];
  });
}

void vote(const Lanes& lanes, const Instruction& in) {
  uint32_t ballot = 0;
  lanes.visit([&](uint32_t k, Thread& thread) {
    if (predicate(thread, in, in.operands[1])) ballot |= 1u << k;
  });
  const uint32_t results[] = {ballot == lanes.mask, ballot != 0, ballot == 0 || ballot == lanes.mask, ballot};
  lanes.visit([&](uint32_t, Thread& thread) { set<uint32_t>(thread, in.operands[0], results[in.variant]); });
}

int64_t reduce(uint8_t reduction, int64_t a, int64_t b) {
  switch (reduction) {
    case kAdd: return a + b;
    case kMin: return std::min(a, b);
    case kMax: return std::max(a, b);
    case kAnd: return a & b;
    case kOr: return a | b;
    default: return a ^ b;
  }
}

void reduce_lanes(const Lanes& lanes, const Instruction& in) {
  int64_t result = 0;
  bool is_first = true;
  lanes.visit([&](uint32_t, Thread& thread) {
    const auto bits = get<uint32_t>(thread, in.operands[1]);
    const int64_t value = in.type == Type::s32 ? static_cast<int32_t>(bits) : int64_t{bits};
    result = is_first ? value : reduce(in.variant, result, value);
    is_first = false;
  });
  lanes.visit([&](uint32_t, Thread& thread) { set<uint32_t>(thread, in.operands[0], static_cast<uint32_t>(result)); });
}

void synchronize_lanes(const Lanes& lanes) {
  Thread* all[kWarp];
  uint32_t count = 0;
  lanes.visit([&](uint32_t, Thread& thread) { all[count++] = &thread; });
  Races::meet(all, count);
}

// Whether all lanes of a mask are at the same instruction with the same mask. A lane that can never come is a fault.
bool have_met(Block* block, Thread& thread, Lanes* lanes, bool* is_fault) {
  lanes->mask = thread.mask;
  if ((thread.mask >> thread.lane & 1) == 0) {
    *is_fault = true;
    report(thread, *thread.waits_at, "a lane is not in its own mask");
    return false;
  }
  for (uint32_t k = 0; k < kWarp; ++k) {
    if ((thread.mask >> k & 1) == 0) continue;
    const uint32_t number = thread.warp * kWarp + k;
    if (number >= block->threads.size() || block->threads[number].exited) {
      *is_fault = true;
      report(thread, *thread.waits_at, "a mask names a lane that has exited or never was");
      return false;
    }
    Thread& other = block->threads[number];
    if (other.waits_at != thread.waits_at || other.waits_for != thread.waits_for || other.mask != thread.mask)
      return false;
    lanes->lane[k] = &other;
  }
  return true;
}

bool let_warps_go_on(Block* block, bool* is_fault) {
  bool any = false;
  for (Thread& thread : block->threads) {
    if (thread.waits_for == Meeting::none || thread.waits_for == Meeting::block || thread.exited) continue;
    Lanes lanes;
    if (!have_met(block, thread, &lanes, is_fault)) {
      if (*is_fault) return false;
      continue;
    }
    const Instruction& in = *thread.waits_at;
    switch (thread.waits_for) {
      case Meeting::shuffle: shuffle(lanes, in); break;
      case Meeting::vote: vote(lanes, in); break;
      case Meeting::reduction: reduce_lanes(lanes, in); break;
      default: synchronize_lanes(lanes); break;
    }
    lanes.visit([](uint32_t, Thread& lane) { lane.waits_for = Meeting::none; });
    any = true;
  }
  return any;
}

// A barrier waits for all threads that have not exited.
bool let_block_go_on(Block* block, bool* is_fault) {
  const Thread* first = nullptr;
  for (const Thread& thread : block->threads) {
    if (thread.exited) continue;
    if (thread.waits_for != Meeting::block) return false;
    if (first == nullptr) first = &thread;
    const auto number_of = [](const Thread& waiting) { return get<uint32_t>(waiting, waiting.waits_at->operands[0]); };
    if (number_of(thread) != number_of(*first)) {
      *is_fault = true;
      report(thread, *thread.waits_at, "threads of a block wait at different barriers");
      return false;
    }
    const Instruction& in = *thread.waits_at;
    if (in.count > 1 && get<uint32_t>(thread, in.operands[1]) != block->threads.size()) {
      *is_fault = true;
      report(thread, in, "a barrier of some threads of a block: not known");
      return false;
    }
  }
  if (first == nullptr) return false;
  Races::meet(block);
  for (Thread& thread : block->threads) thread.waits_for = Meeting::none;
  return true;
}

}  // namespace

bool let_go_on(Block* block, bool* is_fault) {
  return let_warps_go_on(block, is_fault) || (!*is_fault && let_block_go_on(block, is_fault));
}

Handler decode_collective(Opcode& op, Instruction& in) {
  const bool is_barrier = op.is("bar") || op.is("barrier");
  if (is_barrier && op.take("warp")) return op.take("sync") ? wait_for<Meeting::warp> : nullptr;
  if (!op.take("sync")) return nullptr;
  if (is_barrier) {
    op.take_any({"cta", "aligned"});
    return wait_for<Meeting::block>;
  }
  if (size_of(op.type()) != 4 && op.type() != Type::pred) return nullptr;
  int variant = -1;
  Handler handler = nullptr;
  if (op.is("shfl")) {
    variant = op.take_one_of({"up", "down", "bfly", "idx"});
    handler = wait_for<Meeting::shuffle>;
  } else if (op.is("vote")) {
    variant = op.take_one_of({"all", "any", "uni", "ballot"});
    handler = wait_for<Meeting::vote>;
  } else if (op.is("redux")) {
    variant = op.take_one_of({"add", "min", "max", "and", "or", "xor"});
    handler = wait_for<Meeting::reduction>;
  }
  in.variant = static_cast<uint8_t>(variant);
  return variant < 0 ? nullptr : handler;
}

}  // namespace ptx
