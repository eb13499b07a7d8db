#include "work_list.h"

#include <stdexcept>
#include <string>

#include "launch.h"

namespace fused_sam::cuda {

template <int kAddresses>
Entry<kAddresses>::Entry(const Tensor& tensor, int group, uint32_t first_unit, int shift) : first_unit_(first_unit) {
  const void* third = tensor.has_rounded() ? tensor.rounded : tensor.backup;
  const void* addresses[4 + kStates] = {tensor.param,    tensor.grad,     third,      tensor.state[0],
                                        tensor.state[1], tensor.state[2], tensor.step};
  for (int i = 0; i < kAddresses; ++i) {
    const auto address = reinterpret_cast<uintptr_t>(addresses[i]);
    low_[i] = static_cast<uint32_t>(address);
    high_[i] = static_cast<uint16_t>(address >> 32);
  }
  const int64_t units = units_of(tensor.numel, shift);
  const int64_t before = units > 0 ? (units - 1) << shift : 0;
  packed_ = (static_cast<uint32_t>(tensor.numel - before - 1) & 0x3fff) | static_cast<uint32_t>(tensor.dtype) << 14 |
            static_cast<uint32_t>(tensor.grad_dtype) << 16 | static_cast<uint32_t>(tensor.rounded_dtype) << 18 |
            static_cast<uint32_t>(group) << 20;
}

template SlimEntry::Entry(const Tensor&, int, uint32_t, int);
template WideEntry::Entry(const Tensor&, int, uint32_t, int);

void CommonTypes::add(const Tensor& tensor) {
  mixed |= known && (tensor.dtype != param || tensor.rounded_dtype != rounded);
  param = tensor.dtype;
  rounded = tensor.rounded_dtype;
  if (!known) grad = tensor.has_rounded() ? tensor.rounded_dtype : tensor.dtype;  // for lists without gradients
  known = true;
  if (tensor.grad == nullptr) return;
  mixed |= grad_known && tensor.grad_dtype != grad;
  grad = tensor.grad_dtype;
  grad_known = true;
}

int shift_for(int64_t elements) {
  int shift = kMinShift;
  while (shift < kMaxShift && elements >> shift > kMostUnits) ++shift;
  return shift;
}

int64_t most_norm_blocks(const std::vector<Tensor>& tensors) {
  const int shift = shift_of(tensors, has_grad);
  int64_t units = 0, taken = 0;
  for (const Tensor& t : tensors) {
    if (t.numel == 0 || !has_grad(t)) continue;
    units += units_of(t.numel, shift);
    ++taken;
  }
  return taken == 0 ? 0 : units / kUnitsPerBlock + taken / static_cast<int64_t>(kRun) + 1;
}

void require_representable(const std::vector<Tensor>& tensors) {
  int64_t elements = 0;
  for (const Tensor& t : tensors) {
    const void* addresses[] = {t.param, t.rounded, t.grad, t.backup, t.state[0], t.state[1], t.state[2], t.step};
    for (const void* address : addresses) {
      if (reinterpret_cast<uintptr_t>(address) >> 48 != 0) {
        throw std::out_of_range("Invalid tensor address. Must have at most 48 bits.");
      }
    }
    elements += t.numel;
  }
  if (elements >> kMaxShift >= int64_t{1} << 31) {
    throw std::out_of_range("Invalid number of elements, " + std::to_string(elements) + ". Must be below 2^45.");
  }
}

int64_t norm_partials(const std::vector<Tensor>& tensors, double q) {
  return (q == 2.0 ? 1 : 3) * most_norm_blocks(tensors);
}

std::vector<UnitPlace> units(const std::vector<int64_t>& numels, bool grouped) {
  std::vector<Tensor> tensors;
  for (const int64_t numel : numels) {
    // The address tells the tensor's number; nothing is read there.
    auto* number = reinterpret_cast<void*>(tensors.size() + 1);
    const auto group = grouped ? static_cast<int32_t>(tensors.size()) : 0;
    Tensor t{};
    t.param = t.grad = t.backup = number;
    t.numel = numel;
    t.group = group;
    tensors.push_back(t);
  }
  const std::vector<AscentTerms> groups(grouped ? tensors.size() : 1);
  const Cut cut{shift_of(tensors, has_grad), kLargePayload, false, false};
  std::vector<UnitPlace> places;
  int64_t launch = 0;
  for_each_launch(tensors, groups, cut, has_grad, [&](const WorkList<AscentTerms>& list, bool, size_t) {
    const auto walk = list.arguments().walk();
    for (uint32_t i = 0; i < walk.units; ++i) {
      const auto unit = walk.locate(i);
      const auto tensor = static_cast<int64_t>(reinterpret_cast<uintptr_t>(unit.entry->param())) - 1;
      places.push_back({launch, tensor, unit.begin, unit.count});
    }
    ++launch;
  });
  return places;
}

}  // namespace fused_sam::cuda
