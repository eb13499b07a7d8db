// One launch: the arguments that a kernel gets by value, and how a tensor list becomes a sequence of them.
#pragma once

#include <cstring>
#include <vector>

#include "unit_kernels.h"
#include "unit_mean.h"

namespace fused_sam::cuda {

// `payload` begins with the entries; the groups follow them.
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

// What a norm adds to the arguments: the first unit's place among the partials, how many there are in all, and whether
// this launch is the one that adds them up, with a counter of its own. `out` is a Norm; its value is read as the scale
// of the powers by the second of two passes.
struct NormTerms {
  double q;
  double* partials;
  Norm* out;
  uint32_t first_partial, total;
  uint32_t ticket;
  bool last;
};
struct PerturbTerms {
  double q;
  const Norm* norm;  // of which q = 1 and 2 read the value alone
};
struct UpdateTerms {
  const float* grad_scale;  // may be null
  const float* found_inf;   // may be null

  FUSED_SAM_HD float multiplier() const { return grad_scale == nullptr ? 1.0f : 1.0f / *grad_scale; }
  FUSED_SAM_HD bool skip() const { return found_inf != nullptr && *found_inf != 0.0f; }
};
// All that `restore_accumulate` is told is in the groups.
struct MeanUnits {};

// Lanes of a full tree: lane k takes in lane k + half, for every half. Shuffles on the device do the same additions.
inline double add_pairwise(double* lanes, int count) {
  for (int half = count / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

template <class Group>
struct Slice {
  using E = typename Group::Entry;
  std::vector<E> entries;
  std::vector<Group> groups;
  int64_t units = 0;

  size_t bytes() const { return entries.size() * sizeof(E) + groups.size() * sizeof(Group); }

  template <int kBytes>
  void fill(Arguments<Group, kBytes>* arguments, int shift) const {
    arguments->count = static_cast<uint32_t>(entries.size());
    arguments->units = static_cast<uint32_t>(units);
    arguments->shift = shift;
    std::memcpy(arguments->payload, entries.data(), entries.size() * sizeof(E));
    std::memcpy(arguments->payload + entries.size() * sizeof(E), groups.data(), groups.size() * sizeof(Group));
  }
};

// The tensors that take part, in order, in slices of at most `capacity` bytes of entries and groups.
template <class Group, class Takes>
std::vector<Slice<Group>> slices_of(const std::vector<Tensor>& tensors, const std::vector<Group>& groups, int shift,
                                    size_t capacity, const Takes& takes) {
  constexpr int64_t kMostUnits = int64_t{1} << 31;
  std::vector<Slice<Group>> slices;
  int32_t group = -1;
  for (const Tensor& t : tensors) {
    if (t.numel == 0 || !takes(t)) continue;
    const int64_t units = units_of(t.numel, shift);
    const size_t more = sizeof(typename Group::Entry) + sizeof(Group);
    if (slices.empty() || slices.back().bytes() + more > capacity || slices.back().units + units > kMostUnits) {
      slices.emplace_back();
      group = -1;
    }
    Slice<Group>& slice = slices.back();
    if (t.group != group) {
      group = t.group;
      slice.groups.push_back(groups[static_cast<size_t>(group)]);
    }
    slice.entries.emplace_back(t, static_cast<int>(slice.groups.size()) - 1, static_cast<uint32_t>(slice.units), shift);
    slice.units += units;
  }
  return slices;
}

template <class Takes>
int shift_of(const std::vector<Tensor>& tensors, int64_t most_units, const Takes& takes) {
  int64_t elements = 0;
  for (const Tensor& t : tensors) elements += takes(t) ? t.numel : 0;
  return shift_for(elements, most_units);
}

}  // namespace fused_sam::cuda
