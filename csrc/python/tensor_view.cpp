#include "tensor_view.h"

#include <algorithm>

#include "torch_api.h"

namespace fused_sam {
namespace {

// A new reference, or null without an error set.
PyObject* attribute(PyObject* object, const char* name) {
  PyObject* value = PyObject_GetAttrString(object, name);
  if (value == nullptr) PyErr_Clear();
  return value;
}

bool to_dtype(uint8_t code, uint8_t bits, DType* dtype) {
  if (code == dlpack::kFloat && bits == 32)
    *dtype = DType::f32;
  else if (code == dlpack::kFloat && bits == 64)
    *dtype = DType::f64;
  else if (code == dlpack::kBfloat && bits == 16)
    *dtype = DType::bf16;
  else if (code == dlpack::kFloat && bits == 16)
    *dtype = DType::f16;
  else
    return false;
  return true;
}

}  // namespace

bool count_elements(TensorView* view) {
  view->numel = 1;
  view->contiguous = true;
  for (int d = view->ndim - 1; d >= 0; --d) {
    view->contiguous = view->contiguous && (view->shape[d] == 1 || view->strides[d] == view->numel);
    if (view->shape[d] < 0 || __builtin_mul_overflow(view->numel, view->shape[d], &view->numel)) return false;
  }
  const auto item = static_cast<uintptr_t>(size_of(view->dtype));  // a power of two
  if (view->numel > INT64_MAX / size_of(DType::f64)) return false;
  return view->numel == 0 || (view->data != nullptr && (reinterpret_cast<uintptr_t>(view->data) & (item - 1)) == 0);
}

namespace {

// Whether memory was freed: behind an offset nothing looks like an address, if a low one.
bool is_freed(PyObject* tensor, const TensorView& view) {
  constexpr uintptr_t kLow = uintptr_t{1} << 36;
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  if (address >= kLow) return false;
  PyObject* offset = PyObject_CallMethod(tensor, "storage_offset", nullptr);
  const bool freed = offset != nullptr && PyLong_AsSize_t(offset) * static_cast<size_t>(size_of(view.dtype)) == address;
  Py_XDECREF(offset);
  if (PyErr_Occurred()) PyErr_Clear();
  return freed;
}

bool read_described(PyObject* object, Device device, TensorView* view) {
  dlpack::Description d;
  if (TorchApi::get().describe(object, &d) != 0) {
    PyErr_Clear();
    return false;
  }
  if (Device{d.device.type, d.device.index} != device) return false;
  if (d.dtype.lanes != 1 || d.byte_offset != 0) return false;
  if (!to_dtype(d.dtype.code, d.dtype.bits, &view->dtype)) return false;
  view->data = d.data;
  view->ndim = d.ndim;
  view->shape = d.shape;
  view->strides = d.strides;
  return true;
}

bool read_sizes(PyObject* sequence, int64_t* out, int* count) {
  if (sequence == nullptr || !PyTuple_Check(sequence) || PyTuple_GET_SIZE(sequence) > TensorView::kMaxDims)
    return false;
  *count = static_cast<int>(PyTuple_GET_SIZE(sequence));
  for (int i = 0; i < *count; ++i) out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sequence, i));
  return PyErr_Occurred() == nullptr;
}

bool is_on(PyObject* tensor, Device device) {
  PyObject* answer = attribute(tensor, ("is_" + device.kind()).c_str());
  const bool kind = answer == Py_True;
  Py_XDECREF(answer);
  if (!kind || device.cpu()) return kind;
  PyObject* index = PyObject_CallMethod(tensor, "get_device", nullptr);
  const bool same = index != nullptr && PyLong_AsLong(index) == device.index;
  Py_XDECREF(index);
  if (PyErr_Occurred()) PyErr_Clear();
  return same;
}

// Reads the same through Python attributes: for torch before 2.10, and for devices that DLPack counts in its own way.
bool read_attributes(PyObject* object, Device device, TensorView* view) {
  PyObject* dtype = attribute(object, "dtype");
  const auto& dtypes = TorchApi::get().dtypes;
  const auto known = std::find(dtypes.begin(), dtypes.end(), dtype);
  PyObject* layout = attribute(object, "layout");
  bool ok = dtype != nullptr && known != dtypes.end() && layout == TorchApi::get().strided && is_on(object, device);
  Py_XDECREF(dtype);
  Py_XDECREF(layout);
  if (!ok) return false;
  view->dtype = static_cast<DType>(known - dtypes.begin());

  PyObject* shape = attribute(object, "shape");
  PyObject* strides = PyObject_CallMethod(object, "stride", nullptr);
  PyObject* pointer = PyObject_CallMethod(object, "data_ptr", nullptr);
  int stride_count = 0;
  view->data = pointer ? PyLong_AsVoidPtr(pointer) : nullptr;
  ok = pointer != nullptr && read_sizes(shape, view->owned, &view->ndim) &&
       read_sizes(strides, view->owned + TensorView::kMaxDims, &stride_count) && stride_count == view->ndim;
  view->shape = view->owned;
  view->strides = view->owned + TensorView::kMaxDims;
  Py_XDECREF(shape);
  Py_XDECREF(strides);
  Py_XDECREF(pointer);
  if (PyErr_Occurred()) PyErr_Clear();
  return ok;
}

}  // namespace

bool read_tensor(PyObject* object, Device device, TensorView* view) {
  // A real subtype, not what the metaclass would also accept as an instance.
  const TorchApi& api = TorchApi::get();
  if (api.reads(object)) return api.access->read(object, device, view) && count_elements(view);
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(api.tensor_type))) return false;
  const bool described = api.describe != nullptr && device.numbered_alike();
  const bool read = described ? read_described(object, device, view) : read_attributes(object, device, view);
  return read && count_elements(view) && (view->numel == 0 || !is_freed(object, *view));
}

bool is_dense(const TensorView& view) {
  if (view.contiguous || view.numel <= 1) return true;
  if (view.ndim > TensorView::kMaxDims) return false;
  // Dense in some other order of dimensions, such as channels_last.
  int order[TensorView::kMaxDims], used = 0;
  for (int d = 0; d < view.ndim; ++d) {
    if (view.shape[d] != 1) order[used++] = d;
  }
  std::sort(order, order + used, [&](int a, int b) { return view.strides[a] < view.strides[b]; });
  int64_t expected = 1;
  for (int i = 0; i < used; ++i) {
    if (view.strides[order[i]] != expected) return false;
    expected *= view.shape[order[i]];
  }
  return true;
}

bool same_layout(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  const bool any_strides = (a.contiguous && b.contiguous) || a.numel <= 1;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != b.shape[d]) return false;
    if (!any_strides && a.shape[d] != 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

bool is_sole_owner(PyObject* tensor, Py_ssize_t references) {
  const TorchApi& api = TorchApi::get();
  TorchApi::Uses uses;
  return api.counts_uses && Py_REFCNT(tensor) == references && api.count_uses(tensor, &uses) && uses == api.lone;
}

}  // namespace fused_sam
