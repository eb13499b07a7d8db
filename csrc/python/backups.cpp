// Memory for w between the passes.
#include <new>
#include <utility>

#include "batch.h"
#include "torch_api.h"

namespace py = pybind11;

namespace fused_sam {
namespace {

// Tensors smaller than this share one allocation for their backups: asking torch who owns a gradient, and holding on to
// it, costs more than copying so little.
constexpr int64_t kSmallBytes = 4096;
constexpr int64_t kAlignment = 64;

int64_t bytes_of(const Tensor& t) {
  return t.numel * size_of(t.dtype);
}

}  // namespace

void Batch::make_backups(bool owned) {
  int64_t pool_bytes = 0;
  for (const Tensor& t : tensors_) {
    if (t.grad != nullptr && !t.has_rounded() && bytes_of(t) < kSmallBytes)
      pool_bytes += (bytes_of(t) / kAlignment + 1) * kAlignment;
  }
  auto* pool = static_cast<char*>(pool_bytes > 0 ? make_pool(pool_bytes) : nullptr);
  for (Py_ssize_t i = 0; i < count_; ++i) {
    Tensor& t = tensors_[static_cast<size_t>(i)];
    if (t.grad == nullptr) continue;
    if (t.has_rounded()) {
      t.backup = t.param;
    } else if (bytes_of(t) < kSmallBytes) {
      t.backup = pool;
      pool += (bytes_of(t) / kAlignment + 1) * kAlignment;
    } else if (owned && t.grad_dtype == t.dtype &&
               (*grads_)[static_cast<size_t>(i)].is_sole_owner(grads_->references())) {
      t.backup = t.grad;
    } else {
      t.backup = hold(TorchApi::get().empty_like(PyTuple_GET_ITEM(params_.ptr(), i)));
    }
  }
}

// Asking torch for memory takes longer than copying a few small tensors. A GPU's comes from torch, which has to know on
// which stream it is used.
void* Batch::make_pool(int64_t bytes) {
  if (for_gpu_) return hold(TorchApi::get().empty_bytes(bytes, device_));
  constexpr std::align_val_t kAligned{kAlignment};
  const auto release = [](void* memory) { ::operator delete(memory, kAligned); };
  std::shared_ptr<void> pool(::operator new(static_cast<size_t>(bytes), kAligned), release);
  pools_.push_back(std::move(pool));
  return pools_.back().get();
}

// Takes a new tensor, or null with an error set, and returns the address of its memory.
void* Batch::hold(PyObject* memory) {
  if (memory == nullptr) throw py::error_already_set();
  memory_.emplace_back(py::reinterpret_steal<py::object>(memory));
  const auto address = py::reinterpret_steal<py::object>(TorchApi::get().data_ptr.call(memory));
  if (!address) throw py::error_already_set();
  return PyLong_AsVoidPtr(address.ptr());
}

}  // namespace fused_sam
