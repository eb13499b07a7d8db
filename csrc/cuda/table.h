// The tensors of one launch, as kernels find their way through them.
//
// A tensor is cut into units of 2^shift elements, each the work of one warp, so that many small tensors share a block.
// Entries travel as kernel arguments, up to kLargePayload bytes of them with their groups' scalars. A longer list takes
// several launches, which needs no table in device memory: nothing to upload, to recycle or to outlive a CUDA graph.
#pragma once

#include "../kernels.h"

namespace fused_sam::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kUnitsPerBlock = kThreads / kWarp;

// Kernel arguments may take 4 KB, and 32764 bytes since CUDA 12.1 (driver 530); some of it is for other arguments.
constexpr int kSmallPayload = 3968;
constexpr int kLargePayload = 32640;

constexpr int kMinShift = 8, kMaxShift = 14;

// Addresses have 48 bits, and an op takes as many of them as it needs: kAddresses counts param, grad, backup or model,
// the states and then the step.
template <int kAddresses>
class alignas(8) Entry {
 public:
  // Throws std::out_of_range where something does not fit.
  Entry(const Tensor& tensor, int group, uint32_t first_unit, int shift);

  FUSED_SAM_HD void* param() const { return address(0); }
  FUSED_SAM_HD void* grad() const { return address(1); }
  FUSED_SAM_HD void* backup() const { return has_model() ? nullptr : address(2); }
  FUSED_SAM_HD void* model() const { return has_model() ? address(2) : nullptr; }  // then the backup is param
  FUSED_SAM_HD void* state(int i) const { return address(3 + i); }
  FUSED_SAM_HD const float* step() const { return static_cast<const float*>(address(3 + kStates)); }
  FUSED_SAM_HD uint32_t first_unit() const { return first_unit_; }
  FUSED_SAM_HD uint32_t tail() const { return (packed_ & 0x3fff) + 1; }  // elements of the last unit
  FUSED_SAM_HD DType dtype() const { return static_cast<DType>(packed_ >> 14 & 3); }
  FUSED_SAM_HD DType grad_dtype() const { return static_cast<DType>(packed_ >> 16 & 3); }
  FUSED_SAM_HD DType model_dtype() const { return static_cast<DType>(packed_ >> 18 & 3); }
  FUSED_SAM_HD uint32_t group() const { return packed_ >> 20; }

 private:
  FUSED_SAM_HD bool has_model() const { return model_dtype() != DType::f32; }
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

// The smallest shift that cuts `elements` into at most about `units` units. A function of the sizes alone: the norm's
// bits depend on it, and must not depend on the GPU.
int shift_for(int64_t elements, int64_t units);

inline int64_t units_of(int64_t numel, int shift) {
  return (numel + (int64_t{1} << shift) - 1) >> shift;
}

}  // namespace fused_sam::cuda
