#include "table.h"

#include <stdexcept>
#include <string>

namespace fused_sam::cuda {

template <int kAddresses>
Entry<kAddresses>::Entry(const Tensor& tensor, int group, uint32_t first_unit, int shift) : first_unit_(first_unit) {
  const void* third = tensor.has_model() ? tensor.model : tensor.backup;
  const void* addresses[4 + kStates] = {tensor.param,    tensor.grad,     third,      tensor.state[0],
                                        tensor.state[1], tensor.state[2], tensor.step};
  for (int i = 0; i < kAddresses; ++i) {
    const auto address = reinterpret_cast<uintptr_t>(addresses[i]);
    if (address >> 48 != 0) throw std::out_of_range("Invalid tensor address. Must have at most 48 bits.");
    low_[i] = static_cast<uint32_t>(address);
    high_[i] = static_cast<uint16_t>(address >> 32);
  }
  const int64_t whole = (units_of(tensor.numel, shift) - 1) << shift;
  packed_ = static_cast<uint32_t>(tensor.numel - whole - 1) | static_cast<uint32_t>(tensor.dtype) << 14 |
            static_cast<uint32_t>(tensor.grad_dtype) << 16 | static_cast<uint32_t>(tensor.model_dtype) << 18 |
            static_cast<uint32_t>(group) << 20;
}

template SlimEntry::Entry(const Tensor&, int, uint32_t, int);
template WideEntry::Entry(const Tensor&, int, uint32_t, int);

int shift_for(int64_t elements, int64_t units) {
  int shift = kMinShift;
  while (shift < kMaxShift && elements >> shift > units) ++shift;
  return shift;
}

}  // namespace fused_sam::cuda
