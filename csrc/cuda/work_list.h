// The tensors of one launch, as kernels find their way through them, and how a list of tensors becomes launches.
//
// A tensor is cut into units of 2^shift elements, each the work of one warp, so that many small tensors share a block.
// Entries travel as kernel arguments, up to kLargePayload bytes of them with their groups' scalars. A longer list takes
// several launches, which needs no table in device memory: nothing to upload, to recycle or to outlive a CUDA graph.
#pragma once

#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../kernels.h"

namespace fused_sam::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kUnitsPerBlock = kThreads / kWarp;

// Kernel arguments may take 4 KB, and 32764 bytes since CUDA 12.1 (driver 530); some of it is for other arguments. All
// of a kernel's bytes are copied at a launch, so there is a size between for networks of some 200 tensors.
constexpr int kSmallPayload = 3968;
constexpr int kMediumPayload = 8064;
constexpr int kLargePayload = 32640;

constexpr int kMinShift = 8, kMaxShift = 14;

// Units that keep every multiprocessor of the largest GPUs busy without a long tail.
constexpr int64_t kMostUnits = 32768;

// Addresses have 48 bits, and an op takes as many of them as it needs: kAddresses counts param, grad, backup or
// rounded, the states and then the step.
template <int kAddresses>
class alignas(8) Entry {
 public:
  Entry(const Tensor& tensor, int group, uint32_t first_unit, int shift);

  FUSED_SAM_HD void* param() const { return address(0); }
  FUSED_SAM_HD void* grad() const { return address(1); }
  FUSED_SAM_HD void* backup() const { return has_rounded() ? nullptr : address(2); }
  FUSED_SAM_HD void* rounded() const { return has_rounded() ? address(2) : nullptr; }  // then the backup is param
  FUSED_SAM_HD void* state(int i) const { return address(3 + i); }
  // The tensor's, where the cut is `numbered`.
  FUSED_SAM_HD int64_t number() const { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(address(3))); }
  FUSED_SAM_HD const float* step() const { return static_cast<const float*>(address(3 + kStates)); }
  FUSED_SAM_HD uint32_t first_unit() const { return first_unit_; }
  FUSED_SAM_HD uint32_t tail() const { return (packed_ & 0x3fff) + 1; }  // elements of the last unit
  FUSED_SAM_HD DType dtype() const { return static_cast<DType>(packed_ >> 14 & 3); }
  FUSED_SAM_HD DType grad_dtype() const { return static_cast<DType>(packed_ >> 16 & 3); }
  FUSED_SAM_HD DType rounded_dtype() const { return static_cast<DType>(packed_ >> 18 & 3); }
  FUSED_SAM_HD uint32_t group() const { return packed_ >> 20; }

 private:
  FUSED_SAM_HD bool has_rounded() const { return rounded_dtype() != DType::f32; }
  FUSED_SAM_HD void* address(int i) const {
    return reinterpret_cast<void*>(static_cast<uintptr_t>(low_[i]) | static_cast<uintptr_t>(high_[i]) << 32);
  }

  uint32_t low_[kAddresses];
  uint16_t high_[kAddresses];
  uint32_t first_unit_;
  uint32_t packed_;
};
// Of norm, perturb, restore and SGD; of Adam.
using SlimEntry = Entry<4>;
using WideEntry = Entry<4 + kStates>;
static_assert(sizeof(SlimEntry) == 32, "a thousand entries fit one launch");
static_assert(sizeof(WideEntry) == 56, "more than five hundred entries fit one launch");

// Elements [begin, begin + count) of a tensor. begin is a multiple of 2^kMinShift.
template <class E>
struct Unit {
  const E* entry;
  int64_t begin;
  int32_t count;
};

template <class E>
struct Walk {
  const E* entries;  // ascending in first_unit, the first at 0
  uint32_t count, units;
  int32_t shift;

  FUSED_SAM_HD Unit<E> locate(uint32_t unit) const {
    uint32_t low = 0, high = count;
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      if (entries[middle].first_unit() <= unit) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const uint32_t end = high < count ? entries[high].first_unit() : units;
    const int64_t begin = static_cast<int64_t>(unit - entries[low].first_unit()) << shift;
    return {entries + low, begin, unit + 1 == end ? static_cast<int32_t>(entries[low].tail()) : 1 << shift};
  }
};

inline int64_t units_of(int64_t numel, int shift) {
  return (numel + (int64_t{1} << shift) - 1) >> shift;
}

// What a kernel gets by value. `payload` begins with the entries; the groups follow them. A kernel that takes fewer
// bytes reads the beginning of the same thing.
template <class Group, int kBytes>
struct Arguments {
  uint32_t count, units;
  int32_t shift;
  alignas(8) unsigned char payload[kBytes];

  using E = typename Group::Entry;
  FUSED_SAM_HD Walk<E> walk() const { return {reinterpret_cast<const E*>(payload), count, units, shift}; }
  FUSED_SAM_HD const Group& group(uint32_t i) const {
    return reinterpret_cast<const Group*>(payload + count * sizeof(E))[i];
  }
};

// The dtypes of a list's tensors, if all have the same.
struct CommonTypes {
  DType param = DType::f32, grad = DType::f32, rounded = DType::f32;
  bool known = false, grad_known = false, mixed = false;

  void add(const Tensor& tensor);
  bool are(DType p, DType g, DType m = DType::f32) const { return !mixed && param == p && grad == g && rounded == m; }
};

// The arguments of one launch, in the making.
template <class Group>
class WorkList {
 public:
  using E = typename Group::Entry;

  explicit WorkList(int shift) : arguments_(new Arguments<Group, kLargePayload>) { clear(shift); }

  const Arguments<Group, kLargePayload>& arguments() const { return *arguments_; }
  const CommonTypes& types() const { return types_; }
  size_t bytes() const { return arguments_->count * sizeof(E) + groups_.size() * sizeof(Group); }
  uint32_t blocks() const { return (arguments_->units + kUnitsPerBlock - 1) / kUnitsPerBlock; }
  bool empty() const { return arguments_->count == 0; }

  void clear(int shift) {
    arguments_->count = arguments_->units = 0;
    arguments_->shift = shift;
    groups_.clear();
    group_ = -1;
    types_ = {};
  }

  void add(const Tensor& tensor, const std::vector<Group>& groups) {
    if (tensor.group != group_) {
      group_ = tensor.group;
      groups_.push_back(groups[static_cast<size_t>(group_)]);
    }
    types_.add(tensor);
    enter(tensor);
    arguments_->units += static_cast<uint32_t>(units_of(tensor.numel, arguments_->shift));
  }

  // Leaves what is left of the last block without work.
  void finish_block() {
    const uint32_t whole = blocks() * kUnitsPerBlock;
    if (whole == arguments_->units) return;
    enter(Tensor{});
    arguments_->units = whole;
  }

  // To be called before the arguments are used.
  void finish() {
    std::memcpy(arguments_->payload + arguments_->count * sizeof(E), groups_.data(), groups_.size() * sizeof(Group));
  }

 private:
  void enter(const Tensor& tensor) {
    const int group = static_cast<int>(groups_.size()) - 1;
    new (arguments_->payload + arguments_->count * sizeof(E)) E(tensor, group, arguments_->units, arguments_->shift);
    ++arguments_->count;
  }

  std::unique_ptr<Arguments<Group, kLargePayload>> arguments_;
  std::vector<Group> groups_;
  int32_t group_;
  CommonTypes types_;
};

// How a list of tensors is cut. Launches of an op that leaves numbers for each block end where a run of kRun tensors
// does, and so do blocks: which units share a block then depends on the sizes alone, not on how much a launch takes.
struct Cut {
  int shift;
  size_t capacity;    // bytes of entries and groups in a launch
  bool whole_blocks;  // as said
  bool numbered;      // entries carry the tensor's number in the list in the first state's place
};
constexpr size_t kRun = 32;

// Calls visit(work list, last, end) for every launch: `last` for the last of them, and `end` is the number of tensors
// that it and those before it cover. Tensors without elements and those that `takes` does not want are left out.
template <class Group, class Takes, class Visit>
void for_each_launch(const std::vector<Tensor>& tensors, const std::vector<Group>& groups, const Cut& cut,
                     const Takes& takes, const Visit& visit) {
  using E = typename Group::Entry;
  const size_t run = cut.whole_blocks ? kRun : 1;
  const size_t most = run * (sizeof(E) + sizeof(Group)) + (cut.whole_blocks ? sizeof(E) : 0);
  WorkList<Group> list(cut.shift);
  size_t taken = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel == 0 || !takes(tensors[i])) continue;
    if (taken++ % run == 0) {
      if (cut.whole_blocks) list.finish_block();
      if (list.bytes() + most > cut.capacity) {
        list.finish();
        visit(list, false, i);
        list.clear(cut.shift);
      }
    }
    Tensor tensor = tensors[i];
    if (cut.numbered) tensor.state[0] = reinterpret_cast<void*>(i);
    list.add(tensor, groups);
  }
  if (list.empty()) return;
  list.finish();
  visit(list, true, tensors.size());
}

// The smallest shift that cuts `elements` into at most about kMostUnits units. A function of the sizes alone: the
// norm's bits depend on it, and must not depend on the GPU.
int shift_for(int64_t elements);

template <class Takes>
int shift_of(const std::vector<Tensor>& tensors, const Takes& takes) {
  int64_t elements = 0;
  for (const Tensor& t : tensors) elements += takes(t) ? t.numel : 0;
  return shift_for(elements);
}

inline bool has_grad(const Tensor& t) {
  return t.grad != nullptr;
}

// As many blocks as all launches of a norm can have: each run of tensors leaves less than one of them without work.
int64_t most_norm_blocks(const std::vector<Tensor>& tensors);

// Throws std::out_of_range for what entries cannot hold: addresses of more than 48 bits, and too many elements.
void require_representable(const std::vector<Tensor>& tensors);

}  // namespace fused_sam::cuda
