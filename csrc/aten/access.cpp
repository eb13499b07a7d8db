// The module fused_sam._aten: reads and writes torch's tensors through torch's own headers (csrc/python/access.h).
#include "../python/access.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

namespace fused_sam {
namespace {

using Impl = c10::TensorImpl;
using Owner = c10::intrusive_ptr<Impl, c10::UndefinedTensorImpl>;

Impl* impl_of(PyObject* tensor) {
  return THPVariable_Unpack(tensor).unsafeGetTensorImpl();
}

const Impl* impl_of(const Handle* tensor) {
  return reinterpret_cast<const Impl*>(tensor);
}

Impl* impl_of(Handle* tensor) {
  return reinterpret_cast<Impl*>(tensor);
}

Owner owner_of(Handle* tensor) {
  return Owner::reclaim(impl_of(tensor));
}

bool to_dtype(const Impl* tensor, DType* dtype) {
  switch (c10::typeMetaToScalarType(tensor->dtype())) {
    case at::kFloat: *dtype = DType::f32; return true;
    case at::kDouble: *dtype = DType::f64; return true;
    case at::kBFloat16: *dtype = DType::bf16; return true;
    case at::kHalf: *dtype = DType::f16; return true;
    default: return false;
  }
}

bool is_on(const c10::Device& there, Device device) {
  const auto type = device.cpu() ? at::kCPU : device.numbered_alike() ? at::kCUDA : at::kXPU;
  return there.type() == type && (device.cpu() || there.index() == device.index);
}

bool read_impl(const Impl* tensor, Device device, TensorView* view) {
  try {
    if (!tensor->has_storage() || tensor->layout() != at::kStrided || tensor->is_python_dispatch() ||
        tensor->key_set().has(c10::DispatchKey::Negative) || !is_on(tensor->device(), device) ||
        !to_dtype(tensor, &view->dtype)) {
      return false;
    }
    const c10::IntArrayRef sizes = tensor->sizes(), strides = tensor->strides();
    view->data = const_cast<Impl*>(tensor)->mutable_data();
    if (tensor->storage().data() == nullptr) view->data = nullptr;  // freed: an offset would make it look like memory
    view->ndim = static_cast<int>(sizes.size());
    view->shape = sizes.data();
    view->strides = strides.data();
    return true;
  } catch (const c10::Error&) {  // memory or sizes that it does not have, or not as numbers
    return false;
  }
}

// Asks for what `read` will look at. A step has its tensors from memory that the last pass over the weights has left
// cold: what is asked for here arrives while the next tensors are looked up.
void prefetch(const Impl* tensor) {
  constexpr size_t kLine = 64;
  for (size_t offset = 0; offset < sizeof(Impl); offset += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(tensor) + offset);
  }
  __builtin_prefetch(tensor->unsafe_storage().unsafeGetStorageImpl());
}

bool is_plain(PyObject* object) {
  return THPVariable_CheckExact(object);
}

bool read(PyObject* tensor, Device device, TensorView* view) {
  return read_impl(impl_of(tensor), device, view);
}

bool read_handle(const Handle* tensor, Device device, TensorView* view) {
  return read_impl(impl_of(tensor), device, view);
}

Handle* grad_of(PyObject* tensor) {
  const Impl* impl = impl_of(tensor);
  const at::Tensor& grad = impl->grad();
  prefetch(impl);
  if (!grad.defined()) return nullptr;
  prefetch(grad.unsafeGetTensorImpl());
  return reinterpret_cast<Handle*>(Owner(grad.getIntrusivePtr()).release());
}

void clear_grad(PyObject* tensor) {
  Impl* impl = impl_of(tensor);
  if (std::as_const(*impl).grad().defined()) impl->mutable_grad().reset();
}

void bump_version(PyObject* tensor) {
  Impl* impl = impl_of(tensor);
  if (!impl->is_inference()) impl->bump_version();
}

bool is_sole_owner(const Handle* tensor) {
  const Impl* impl = impl_of(tensor);
  const c10::Storage& storage = impl->storage();
  return c10::raw::intrusive_ptr::use_count(const_cast<Impl*>(impl)) == 1 && storage.use_count() == 1 &&
         storage.resizable();
}

PyObject* to_object(Handle* tensor) {
  return THPVariable_Wrap(at::Tensor(owner_of(tensor)));
}

Handle* copy(Handle* tensor) {
  c10::raw::intrusive_ptr::incref(impl_of(tensor));
  return tensor;
}

void release(Handle* tensor) {
  owner_of(tensor).reset();
}

PyObject* empty_number() {
  try {
    return THPVariable_Wrap(at::Tensor(at::detail::empty_cpu({}, at::kDouble)));
  } catch (const std::exception& error) {
    if (PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

const Access kAccess{Access::kVersion, is_plain,      read,      read_handle, grad_of, clear_grad,
                     bump_version,     is_sole_owner, to_object, copy,        release, empty_number};

PyModuleDef kModule{PyModuleDef_HEAD_INIT,
                    "_aten",
                    "Reads torch's tensors for fused_sam._native. Private.",
                    -1,
                    nullptr,
                    nullptr,
                    nullptr,
                    nullptr,
                    nullptr};

}  // namespace
}  // namespace fused_sam

PyMODINIT_FUNC PyInit__aten() {
  using namespace fused_sam;
  PyObject* module = PyModule_Create(&kModule);
  PyObject* access = PyCapsule_New(const_cast<Access*>(&kAccess), Access::kCapsule, nullptr);
  const bool made = module != nullptr && access != nullptr && PyModule_AddObjectRef(module, "access", access) == 0 &&
                    PyModule_AddStringConstant(module, "torch_version", FUSED_SAM_TORCH_VERSION) == 0;
  Py_XDECREF(access);
  if (made) return module;
  Py_XDECREF(module);
  return nullptr;
}
