// Which thread runs next, and for how long: any order that a GPU could choose, by a seed.
#include <algorithm>
#include <numeric>

#include "values.h"

namespace ptx {

Settings settings;

namespace {

std::vector<std::string>& kept_reports() {
  static std::vector<std::string> kept;
  return kept;
}

class Scheduler {
 public:
  explicit Scheduler(Grid* grid) : grid_(grid) {
    per_block_ = grid->threads[0] * grid->threads[1] * grid->threads[2];
    waiting_blocks_.resize(grid->blocks[0] * grid->blocks[1] * grid->blocks[2]);
    std::iota(waiting_blocks_.rbegin(), waiting_blocks_.rend(), 0);  // taken from the end
    thread_order_.resize(per_block_);
    std::iota(thread_order_.begin(), thread_order_.end(), 0);
    if (settings.shuffle) std::shuffle(waiting_blocks_.begin(), waiting_blocks_.end(), grid->random);
    admit();
  }

  bool is_done() const { return resident_.empty(); }

  // Lets one block run for a while. False after a fault.
  bool run_a_while() {
    const size_t which = resident_.size() > 1 ? grid_->random() % resident_.size() : 0;
    Block* block = resident_[which].get();
    const bool moved = run_threads(block);
    if (is_fault_) return false;
    if (block->exited == per_block_) {
      if (grid_->races != nullptr) grid_->races->forget(reinterpret_cast<uint64_t>(block->shared), block->shared_bytes);
      resident_.erase(resident_.begin() + static_cast<std::ptrdiff_t>(which));
      admit();
    } else if (!let_go_on(block, &is_fault_) && !moved && !is_fault_) {
      report_deadlock(*block);
      is_fault_ = true;
    }
    return !is_fault_;
  }

 private:
  void admit() {
    while (resident_.size() < std::max(1u, settings.resident) && !waiting_blocks_.empty()) {
      resident_.push_back(make_block(waiting_blocks_.back()));
      waiting_blocks_.pop_back();
    }
  }

  std::unique_ptr<Block> make_block(uint32_t number) {
    auto block = std::make_unique<Block>();
    block->grid = grid_;
    block->number = number;
    block->place[0] = number % grid_->blocks[0];
    block->place[1] = number / grid_->blocks[0] % grid_->blocks[1];
    block->place[2] = number / grid_->blocks[0] / grid_->blocks[1];
    constexpr uint32_t kAlign = 128;
    block->shared_bytes = grid_->module->shared_bytes + grid_->dynamic_shared;
    block->shared_owner.reset(new char[block->shared_bytes + kAlign]);
    const auto address = reinterpret_cast<uint64_t>(block->shared_owner.get());
    block->shared = block->shared_owner.get() + (kAlign - address % kAlign) % kAlign;
    std::memset(block->shared, kPoison, block->shared_bytes);
    block->threads.resize(per_block_);
    for (uint32_t k = 0; k < per_block_; ++k) {
      Thread& thread = block->threads[k];
      thread.block = block.get();
      thread.number = k;
      thread.lane = k % kWarp;
      thread.warp = k / kWarp;
    }
    return block;
  }

  // In the order of special_register() in parser_instructions.cpp.
  void start(Thread* thread) const {
    thread->frame = new_frame(*grid_->function);
    thread->registers = thread->frame.registers.get();
    thread->started = true;
    const uint32_t* extent = grid_->threads;
    const uint32_t k = thread->number;
    const uint32_t specials[] = {k % extent[0],
                                 k / extent[0] % extent[1],
                                 k / extent[0] / extent[1],
                                 extent[0],
                                 extent[1],
                                 extent[2],
                                 thread->block->place[0],
                                 thread->block->place[1],
                                 thread->block->place[2],
                                 grid_->blocks[0],
                                 grid_->blocks[1],
                                 grid_->blocks[2],
                                 thread->lane,
                                 thread->warp,
                                 (1u << thread->lane) - 1};
    std::copy(std::begin(specials), std::end(specials), thread->registers);
    thread->registers[kKernelParameters] = reinterpret_cast<uint64_t>(grid_->parameters);
  }

  // Lets each thread of a block run that can; with preemption, some of them. False where none could.
  bool run_threads(Block* block) {
    if (settings.shuffle) std::shuffle(thread_order_.begin(), thread_order_.end(), grid_->random);
    uint64_t turns = settings.quantum == 0 ? per_block_ : 1 + grid_->random() % per_block_;
    bool moved = false;
    for (const uint32_t number : thread_order_) {
      Thread& thread = block->threads[number];
      if (!thread.ready()) continue;
      moved = true;
      const uint64_t budget = settings.quantum == 0 ? ~uint64_t{0} : 1 + grid_->random() % settings.quantum;
      const Step step = run_thread(thread, budget);
      if (step == Step::exited) {
        thread.exited = true;
        thread.frame = Frame();
        ++block->exited;
      }
      is_fault_ = is_fault_ || step == Step::fault;
      if (is_fault_ || --turns == 0) break;
    }
    return moved;
  }

  Step run_thread(Thread& thread, uint64_t budget) const {
    if (!thread.started) start(&thread);
    for (; budget > 0; --budget) {
      const Instruction& in = thread.frame.function->code[thread.frame.next++];
      if (in.guard >= 0) {
        const uint64_t guard = thread.registers[in.guard];
        if (guard > 1) report(thread, in, "an undefined predicate is read");
        if ((guard != 0) == in.negated) continue;
      }
      const Step step = in.run(thread, in);
      if (step != Step::next) return step;
    }
    return Step::next;
  }

  static void report_deadlock(const Block& block) {
    for (const Thread& thread : block.threads) {
      if (!thread.exited) return report(thread, *thread.waits_at, "deadlock: other threads never come here");
    }
  }

  Grid* grid_;
  uint32_t per_block_ = 0;
  std::vector<uint32_t> waiting_blocks_, thread_order_;
  std::vector<std::unique_ptr<Block>> resident_;
  bool is_fault_ = false;
};

}  // namespace

bool run_together(const std::vector<Grid*>& grids) {
  std::vector<Scheduler> under_way(grids.begin(), grids.end());
  while (!under_way.empty()) {
    const size_t which = under_way.size() > 1 ? grids[0]->random() % under_way.size() : 0;
    if (!under_way[which].run_a_while()) return false;
    if (under_way[which].is_done()) under_way.erase(under_way.begin() + static_cast<std::ptrdiff_t>(which));
  }
  return true;
}

void report(const std::string& what) {
  constexpr size_t kMost = 200;
  if (kept_reports().size() < kMost) kept_reports().push_back(what);
}

void report(const Thread& thread, const Instruction& in, const std::string& what) {
  const std::string& function = thread.frame.function->name;
  report(what + " [block " + std::to_string(thread.block->number) + " thread " + std::to_string(thread.number) +
         ", PTX line " + std::to_string(in.line) + ": " + in.text.substr(0, 120) + ", in " + function + "]");
}

std::vector<std::string>& reports() {
  return kept_reports();
}

Step fault(const Thread& thread, const Instruction& in, const std::string& what) {
  report(thread, in, what);
  return Step::fault;
}

}  // namespace ptx
