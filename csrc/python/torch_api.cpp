#include "torch_api.h"

namespace py = pybind11;

namespace fused_sam {
namespace {

PyObject* imported(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

PyObject* imported_or_null(const char* module, const char* name) {
  const py::object found = py::getattr(py::module_::import(module), name, py::none());
  return found.is_none() ? nullptr : py::object(found).release().ptr();
}

// Takes the reference.
long as_long(PyObject* number) {
  if (number == nullptr) return -1;
  const long value = PyLong_AsLong(number);
  Py_DECREF(number);
  return value;
}

PyObject* plain_parameter_type() {
  static PyObject* const type = imported("torch.nn", "Parameter");
  return type;
}

}  // namespace

Attribute::Attribute(PyObject* type, const char* name)
    : type_(type), name_(PyUnicode_InternFromString(name)), descriptor_(PyObject_GetAttr(type, name_)) {
  if (descriptor_ == nullptr) PyErr_Clear();
}

bool Attribute::direct(PyObject* object) const {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return descriptor_ != nullptr && (type == type_ || type == plain_parameter_type());
}

PyObject* Attribute::get(PyObject* object) const {
  const auto getter = descriptor_ ? Py_TYPE(descriptor_)->tp_descr_get : nullptr;
  if (getter == nullptr || !direct(object)) return PyObject_GetAttr(object, name_);
  return getter(descriptor_, object, reinterpret_cast<PyObject*>(Py_TYPE(object)));
}

bool Attribute::set(PyObject* object, PyObject* value) const {
  const auto setter = descriptor_ ? Py_TYPE(descriptor_)->tp_descr_set : nullptr;
  if (setter == nullptr || !direct(object)) return PyObject_SetAttr(object, name_, value) == 0;
  return setter(descriptor_, object, value) == 0;
}

PyObject* Attribute::call(PyObject* object) const {
  if (!direct(object)) return PyObject_CallMethodNoArgs(object, name_);
  return PyObject_CallOneArg(descriptor_, object);
}

TorchApi::TorchApi()
    : tensor_type(imported("torch", "Tensor")),
      strided(imported("torch", "strided")),
      torch(py::module_::import("torch").release().ptr()),
      empty_name(PyUnicode_InternFromString("empty")),
      empty_like_name(PyUnicode_InternFromString("empty_like")),
      empty_keywords(py::make_tuple("dtype", "device").release().ptr()),
      uint8(imported("torch", "uint8")),
      dtypes{imported("torch", "float32"), imported("torch", "float64"), imported("torch", "bfloat16"),
             imported("torch", "float16")},
      storage_use_count(imported_or_null("torch._C", "_storage_Use_Count")),
      increment_version(imported("torch.autograd.graph", "increment_version")),
      grad(tensor_type, "grad"),
      is_neg(tensor_type, "is_neg"),
      data_ptr(tensor_type, "data_ptr"),
      use_count(tensor_type, "_use_count"),
      untyped_storage(tensor_type, "untyped_storage"),
      storage_cdata(imported("torch", "UntypedStorage"), "_cdata"),
      storage_resizable(imported("torch", "UntypedStorage"), "resizable") {
  const py::object capsule = py::getattr(py::handle(tensor_type), "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api->version.major == 1) describe = api->describe;
  }
  const py::object tensor = py::handle(torch).attr("empty")(1);
  counts_uses = count_uses(tensor.ptr(), &lone);
}

namespace {

TorchApi& instance() {
  static TorchApi* const api = new TorchApi();
  return *api;
}

}  // namespace

const TorchApi& TorchApi::get() {
  return instance();
}

void TorchApi::read_through(const py::object& capsule) {
  TorchApi& api = instance();
  if (capsule.is_none()) {
    api.reading = false;
    return;
  }
  const auto* access = static_cast<const Access*>(PyCapsule_GetPointer(capsule.ptr(), Access::kCapsule));
  if (access == nullptr) throw py::error_already_set();
  if (access->version != Access::kVersion)
    throw py::value_error(
        "Invalid fused_sam._aten, of another build than fused_sam._native. Must be installed with it.");
  api.access = access;
  api.reading = true;
}

PyObject* TorchApi::empty_number() const {
  if (reading) return access->empty_number();
  const py::tuple shape;
  const py::str name("cpu");
  PyObject* const arguments[] = {torch, shape.ptr(), dtypes[static_cast<size_t>(DType::f64)], name.ptr()};
  return PyObject_VectorcallMethod(empty_name, arguments, 2, empty_keywords);
}

PyObject* TorchApi::empty_bytes(int64_t bytes, Device device) const {
  const py::int_ size(bytes);
  const py::str name(device.name());
  PyObject* const arguments[] = {torch, size.ptr(), uint8, name.ptr()};
  return PyObject_VectorcallMethod(empty_name, arguments, 2, empty_keywords);
}

bool TorchApi::count_uses(PyObject* tensor, Uses* uses) const {
  if (storage_use_count == nullptr) return false;
  uses->tensor = as_long(use_count.call(tensor));
  PyObject* storage = untyped_storage.call(tensor);
  PyObject* cdata = storage ? storage_cdata.get(storage) : nullptr;
  uses->storage = cdata ? as_long(PyObject_CallOneArg(storage_use_count, cdata)) : -1;
  PyObject* resizable = storage ? storage_resizable.call(storage) : nullptr;
  uses->resizable = resizable == Py_True;
  uses->storage_object = storage ? static_cast<long>(Py_REFCNT(storage)) : -1;
  Py_XDECREF(resizable);
  Py_XDECREF(cdata);
  Py_XDECREF(storage);
  if (PyErr_Occurred()) PyErr_Clear();
  return uses->tensor > 0 && uses->storage > 0;
}

}  // namespace fused_sam
