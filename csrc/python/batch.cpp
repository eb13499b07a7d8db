#include "batch.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "disjoint.h"
#include "lists.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace fused_sam {
namespace {

py::tuple checked(const py::object& list, Py_ssize_t count, const char* name) {
  return list.is_none() ? py::tuple() : require_length(list, count, name);
}

std::shared_ptr<Gradients> gradients(const py::object& grads, Py_ssize_t count) {
  if (grads.is_none()) return nullptr;
  if (!py::isinstance<Gradients>(grads)) return std::make_shared<Gradients>(grads, count);
  auto shared = grads.cast<std::shared_ptr<Gradients>>();
  require_length(static_cast<Py_ssize_t>(shared->size()), count, "grads");
  return shared;
}

// Null where the list is absent or holds None.
PyObject* item(const py::tuple& items, Py_ssize_t index) {
  if (PyTuple_GET_SIZE(items.ptr()) == 0) return nullptr;
  PyObject* object = PyTuple_GET_ITEM(items.ptr(), index);
  return object == Py_None ? nullptr : object;
}

// Reads an operand that must match the parameter element by element in memory.
bool read_operand(PyObject* object, Device device, const TensorView& param, void** data) {
  *data = nullptr;
  if (object == nullptr) return true;
  TensorView view;
  if (!read_tensor(object, device, &view) || view.dtype != param.dtype || !same_layout(view, param)) return false;
  *data = view.data;
  return true;
}

// Reads a gradient, which may be of another dtype than its parameter.
bool read_grad(const HeldTensor& grad, Device device, const TensorView& param, Tensor* out) {
  if (!grad.defined()) return true;
  TensorView view;
  if (!grad.read(device, &view) || !can_mix(param.dtype, view.dtype) || !same_layout(view, param)) return false;
  out->grad = view.data;
  out->grad_dtype = view.dtype;
  return true;
}

// Reads a parameter the kernels can take, into what of the descriptor is the parameter's.
bool read_dense_param(PyObject* object, Device device, TensorView* view, Tensor* out) {
  if (!read_tensor(object, device, view) || !is_dense(*view)) return false;
  out->param = view->data;
  out->numel = view->numel;
  out->dtype = view->dtype;
  return true;
}

// Equal for tensors of one dtype whose elements of equal index lie at equal offsets (FNV-1a).
uint64_t layout_key(const TensorView& view) {
  uint64_t key = 14695981039346656037u;
  const auto mix = [&key](int64_t value) { key = (key ^ static_cast<uint64_t>(value)) * 1099511628211u; };
  const bool any_strides = view.contiguous || view.numel <= 1;
  mix(static_cast<int64_t>(view.dtype) + 8 * view.ndim);
  for (int d = 0; d < view.ndim; ++d) {
    mix(view.shape[d]);
    if (!any_strides && view.shape[d] != 1) mix(view.strides[d]);
  }
  return key;
}

py::value_error changed(Py_ssize_t index) {
  return py::value_error("Invalid params. Parameter " + std::to_string(index) +
                         " has been replaced, or has changed in size, dtype or memory layout, while perturbed.");
}

}  // namespace

Batch::Batch(const py::list& params, const py::object& grads, const py::object& backups, const py::tuple& states,
             const py::object& masters, int device_type, int device_index, bool for_gpu)
    : device_{device_type, device_index},
      for_gpu_(for_gpu),
      count_(static_cast<Py_ssize_t>(params.size())),
      params_(checked(params, count_, "params")),
      masters_(checked(masters, count_, "masters")),
      grads_(gradients(grads, count_)),
      tensors_(static_cast<size_t>(count_)),
      layouts_(static_cast<size_t>(count_)) {
  if (states.size() > kStates) throw py::value_error("Invalid states. Must be " + std::to_string(kStates) + " lists.");
  for (size_t k = 0; k < states.size(); ++k) states_[k] = checked(states[k], count_, "states");
  const bool kept = py::isinstance<Batch>(backups);
  if (!kept) backups_ = checked(backups, count_, "backups");
  for (Py_ssize_t i = 0; i < count_; ++i) {
    if (!describe(i, &tensors_[static_cast<size_t>(i)])) unsupported_.push_back(i);
  }
  if (kept) use_backups_of(backups.cast<const Batch&>());
}

bool Batch::describe(Py_ssize_t index, Tensor* out) {
  const HeldTensor none;
  const HeldTensor& grad = grads_ ? (*grads_)[static_cast<size_t>(index)] : none;
  PyObject* backup = item(backups_, index);
  *out = Tensor{};
  if (!grad.defined() && backup == nullptr) return true;
  TensorView param, master;
  if (!read_weights(index, &param, &master, out)) return false;
  const TensorView& weights = out->has_rounded() ? master : param;
  layouts_[static_cast<size_t>(index)] = layout_key(param);
  if (out->has_rounded() && backup != nullptr) return false;
  if (!read_grad(grad, device_, param, out) || !read_operand(backup, device_, param, &out->backup)) return false;
  for (int k = 0; k < kStates; ++k) {
    if (!read_operand(item(states_[k], index), device_, weights, &out->state[k])) return false;
  }
  return true;
}

// The parameter, and its master where it has one, which the kernels take for it.
bool Batch::read_weights(Py_ssize_t index, TensorView* param, TensorView* master, Tensor* out) const {
  if (!read_dense_param(PyTuple_GET_ITEM(params_.ptr(), index), device_, param, out)) return false;
  PyObject* object = item(masters_, index);
  if (object == nullptr) return true;
  if (size_of(param->dtype) != 2 || !read_tensor(object, device_, master) || master->dtype != DType::f32 ||
      !same_layout(*master, *param)) {
    return false;
  }
  out->rounded = param->data;
  out->rounded_dtype = param->dtype;
  out->param = master->data;
  out->dtype = DType::f32;
  return true;
}

void Batch::read_steps(const py::object& steps) {
  const py::tuple items = checked(steps, count_, "steps");
  for (Py_ssize_t i = 0; i < count_; ++i) {
    Tensor& t = tensors_[static_cast<size_t>(i)];
    PyObject* step = item(items, i);
    t.step = nullptr;
    if (t.grad == nullptr || step == nullptr) continue;
    TensorView view;
    if (!read_tensor(step, device_, &view) || view.dtype != DType::f32 || view.numel != 1) {
      throw py::value_error("Invalid step at index " + std::to_string(i) +
                            ". Must be a float32 tensor of one element on the device of its parameter.");
    }
    t.step = static_cast<const float*>(view.data);
  }
}

// A parameter that the ascent moved and that has no gradient now takes part too: it is restored.
void Batch::use_backups_of(const Batch& ascent) {
  if (ascent.count_ > count_ || ascent.device_ != device_)
    throw py::value_error("Invalid backups. Must be of the same parameters.");
  pools_ = ascent.pools_;
  memory_ = ascent.memory_;
  for (Py_ssize_t i = 0; i < ascent.count_; ++i) {
    const auto k = static_cast<size_t>(i);
    if (ascent.tensors_[k].backup == nullptr) continue;
    PyObject* object = PyTuple_GET_ITEM(params_.ptr(), i);
    TensorView param, master;
    const bool taking_part = tensors_[k].param != nullptr;
    const bool fits = taking_part || read_weights(i, &param, &master, &tensors_[k]);
    if (fits && !taking_part) layouts_[k] = layout_key(param);
    const bool same_master = tensors_[k].dtype == ascent.tensors_[k].dtype &&
                             (!tensors_[k].has_rounded() || tensors_[k].param == ascent.tensors_[k].param);
    if (!fits || object != PyTuple_GET_ITEM(ascent.params_.ptr(), i) || layouts_[k] != ascent.layouts_[k] ||
        !same_master) {
      throw changed(i);
    }
    tensors_[k].backup = ascent.tensors_[k].backup;
  }
}

void Batch::refresh() {
  disjoint_ = false;
  for (Py_ssize_t i = 0; i < count_; ++i) {
    const auto k = static_cast<size_t>(i);
    if (tensors_[k].backup == nullptr) continue;
    TensorView param, master;
    if (!read_weights(i, &param, &master, &tensors_[k]) || layout_key(param) != layouts_[k]) {
      throw changed(i);
    }
  }
}

py::list Batch::has_backup() const {
  py::list answers;
  for (const Tensor& t : tensors_) {
    if (t.backup != nullptr) {
      answers.append(true);
    } else {
      answers.append(py::none());
    }
  }
  return answers;
}

void Batch::keep_backups(size_t displaced) {
  for (Py_ssize_t i = 0; i < count_; ++i) {
    Tensor& t = tensors_[static_cast<size_t>(i)];
    if (static_cast<size_t>(i) >= displaced) t.backup = nullptr;
    if (t.backup != nullptr && t.backup == t.grad) memory_.push_back((*grads_)[static_cast<size_t>(i)]);
    t.grad = nullptr;
  }
  grads_ = nullptr;
}

py::list Batch::memory() {
  py::list objects;
  for (HeldTensor& tensor : memory_) objects.append(tensor.object());
  return objects;
}

void Batch::set_backups(const py::list& backups) {
  disjoint_ = false;
  backups_ = checked(backups, count_, "backups");
  for (Py_ssize_t i = 0; i < count_; ++i) {
    Tensor& t = tensors_[static_cast<size_t>(i)];
    PyObject* backup = item(backups_, i);
    if (t.grad == nullptr && backup == nullptr) continue;
    if (backup == nullptr && t.has_rounded()) {
      t.backup = t.param;
    } else if (!t.has_rounded() && grads_ && (*grads_)[static_cast<size_t>(i)].is(backup) && t.grad_dtype == t.dtype) {
      t.backup = t.grad;
    } else if (backup == nullptr || !describe(i, &t)) {
      throw py::value_error("Invalid backup at index " + std::to_string(i) +
                            ". Must match its parameter in dtype, shape and memory layout.");
    }
  }
}

const std::vector<Tensor>& Batch::gather(const std::vector<int64_t>& sizes) {
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  if (total != count_ || std::any_of(sizes.begin(), sizes.end(), [](int64_t size) { return size < 0; })) {
    throw py::value_error("Invalid group sizes: their sum is " + std::to_string(total) +
                          ". Must be len(params)=" + std::to_string(count_) + ".");
  }
  if (!unsupported_.empty()) {
    throw py::value_error("Invalid tensor at index " + std::to_string(unsupported_.front()) +
                          ". Parameter, gradient, backup and state must be dense tensors of one "
                          "device, floating dtype, shape and memory layout.");
  }
  size_t i = 0;
  for (size_t group = 0; group < sizes.size(); ++group) {
    for (int64_t k = 0; k < sizes[group]; ++k) tensors_[i++].group = static_cast<int32_t>(group);
  }
  if (!disjoint_) {
    // Backups made here overlap nothing.
    require_disjoint(tensors_, PyTuple_GET_SIZE(backups_.ptr()) > 0);
    disjoint_ = true;
  }
  return tensors_;
}

}  // namespace fused_sam
