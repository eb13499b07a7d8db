// In the place of csrc/cuda/on_host.cpp: the ops of CPU tensors are launches of the device's kernels, by the real
// launch code, on the only device that the emulator has.
#include "../../csrc/cuda/targets.h"

extern "C" void emulator_fail_after(int64_t good);

namespace fused_sam::cuda {
namespace {

template <auto kOp, class... Arguments>
void on_device(const Target&, const Arguments&... arguments) {
  (device_ops().*kOp)(Target{0, nullptr}, arguments...);
}

void clear(const Target&, Norm* out) {
  device_ops().clear(Target{0, nullptr}, out);
}

size_t capacity() {
  return device_ops().capacity();
}

}  // namespace

void fail_on_host(int64_t good) {
  emulator_fail_after(good);
}

const Ops& host_ops() {
  static const Ops ops{capacity,
                       on_device<&Ops::norm>,
                       on_device<&Ops::peak>,
                       on_device<&Ops::powers>,
                       clear,
                       on_device<&Ops::perturb>,
                       on_device<&Ops::accumulate>,
                       on_device<&Ops::sgd_update>,
                       on_device<&Ops::adam_update>};
  return ops;
}

}  // namespace fused_sam::cuda
