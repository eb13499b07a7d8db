// Sums of squares of one block in fp64.
#pragma once

#include "simd.h"

namespace fused_sam::cpu::FUSED_SAM_ISA {

// Element i of a block is added to lane i % kLanes, whatever the vector width, and the lanes are added pairwise:
// every instruction set performs the same additions in the same order.
class SquareSum {
 public:
  static constexpr int kLanes = 32;

  SquareSum() {
    for (VecD& s : sum_) s = VecD::set(0.0);
  }

  // The next kLanes elements, of which at(k) has those from k on.
  template <class F>
  void add(const F& at) {
    for (int k = 0; k < kVectors; ++k) {
      const VecD x = at(k * VecD::width);
      sum_[k] = fma(x, x, sum_[k]);
    }
  }

  double total() const {
    alignas(64) double lanes[kLanes];
    for (int k = 0; k < kVectors; ++k) sum_[k].store(lanes + k * VecD::width);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    }
    return lanes[0];
  }

 private:
  static constexpr int kVectors = kLanes / VecD::width;
  VecD sum_[kVectors];
};

// The squares of a block that is being written, added while it is in the nearest cache: what `sum_of_squares` of it
// gives afterwards.
template <class T>
class SquareTrail {
 public:
  static constexpr int64_t kRun = 256;  // elements between two calls of `follow`

  explicit SquareTrail(const T* block) : block_(block) {}

  // The elements before `end` have been written.
  void follow(int64_t end) {
    for (; done_ + SquareSum::kLanes <= end; done_ += SquareSum::kLanes) {
      const T* next = block_ + done_;
      sum_.add([&](int k) { return VecD::load(next + k); });
    }
  }

  // All have.
  double finish(int64_t count) {
    follow(count);
    if (done_ < count) {
      T tail[SquareSum::kLanes] = {};
      for (int64_t k = 0; done_ + k < count; ++k) tail[k] = block_[done_ + k];
      sum_.add([&](int k) { return VecD::load(tail + k); });
    }
    return sum_.total();
  }

 private:
  const T* block_;
  int64_t done_ = 0;
  SquareSum sum_;
};

}  // namespace fused_sam::cpu::FUSED_SAM_ISA
