#include "disjoint.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <unordered_map>
#include <utility>

namespace fused_sam {

namespace {

using Range = std::pair<uintptr_t, uintptr_t>;
using Order = std::vector<size_t>;  // indices of ranges, by where they begin

bool overlap(const std::vector<Range>& ranges, const Order& order) {
  for (size_t i = 1; i < order.size(); ++i) {
    if (ranges[order[i]].first < ranges[order[i - 1]].second) return true;
  }
  return false;
}

// The order in which as many ranges lay last time: between two steps memory rarely moves, and to try it takes a tenth
// of the time that sorting does.
Order& last_order(size_t count) {
  static thread_local std::unordered_map<size_t, Order> orders;
  if (orders.size() > 16) orders.clear();
  return orders[count];
}

}  // namespace

void require_disjoint(const std::vector<Tensor>& tensors, bool with_backups) {
  std::vector<Range> ranges((3 + kStates) * tensors.size());
  size_t count = 0;
  const auto add = [&](const void* data, const Tensor& t, DType dtype) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const auto bytes = static_cast<uintptr_t>(t.numel * size_of(dtype));
    if (data != nullptr && bytes > 0) ranges[count++] = {begin, begin + bytes};
  };
  for (const Tensor& t : tensors) {
    add(t.param, t, t.dtype);
    add(t.rounded, t, t.rounded_dtype);
    for (const void* state : t.state) add(state, t, t.dtype);
    // A master is its own backup.
    if (with_backups && !t.has_rounded()) add(t.backup, t, t.dtype);
  }
  ranges.resize(count);
  Order& order = last_order(count);
  if (!order.empty() && !overlap(ranges, order)) return;
  order.resize(count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return ranges[a] < ranges[b]; });
  if (overlap(ranges, order)) {
    throw pybind11::value_error("Invalid memory layout: parameters, backups and state must not overlap.");
  }
}

}  // namespace fused_sam
