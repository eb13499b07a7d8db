#include "disjoint.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace fused_sam {

void require_disjoint(const std::vector<Tensor>& tensors, bool with_backups) {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  ranges.reserve((3 + kStates) * tensors.size());
  const auto add = [&](const void* data, const Tensor& t, DType dtype) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const auto bytes = static_cast<uintptr_t>(t.numel * size_of(dtype));
    if (data != nullptr && bytes > 0) ranges.emplace_back(begin, begin + bytes);
  };
  for (const Tensor& t : tensors) {
    add(t.param, t, t.dtype);
    add(t.rounded, t, t.rounded_dtype);
    for (const void* state : t.state) add(state, t, t.dtype);
    // A master is its own backup.
    if (with_backups && !t.has_rounded()) add(t.backup, t, t.dtype);
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) {
      throw pybind11::value_error("Invalid memory layout: parameters, backups and state must not overlap.");
    }
  }
}

}  // namespace fused_sam
