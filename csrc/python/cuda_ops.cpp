#include "cuda_ops.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <string>

namespace py = pybind11;

namespace fused_sam {

cuda::Target target_of(const Batch& batch, uintptr_t stream) {
  const Device device = batch.device();
  if (device.cpu()) return {-1, nullptr};
  if (!device.cuda()) throw py::value_error("Invalid tensors. Must be on a CUDA device.");
  return {device.index, reinterpret_cast<void*>(stream)};
}

namespace {

// As in bindings.cpp, but rho and lr may be tensors on the device.
using AscentTuple = std::tuple<int64_t, py::object, bool, double, double>;
using SgdTuple = std::tuple<int64_t, py::object, double, double, double, bool, bool, bool>;
using AdamTuple =
    std::tuple<int64_t, py::object, double, double, double, double, bool, bool, bool, bool, double, double>;

cuda::Scalar scalar_of(const py::object& value, Device device, const char* name) {
  if (PyNumber_Check(value.ptr()) && !py::hasattr(value, "data_ptr"))
    return {value.cast<double>(), nullptr, DType::f64};
  TensorView view;
  if (!read_tensor(value.ptr(), device, &view) || view.numel != 1) {
    throw py::value_error(std::string("Invalid ") + name +
                          ". Must be a number, or a floating tensor of one element on the device of the parameters.");
  }
  return {0.0, view.data, view.dtype};
}

std::vector<cuda::AscentTerms> ascent_terms(const std::vector<AscentTuple>& groups, Device device) {
  std::vector<cuda::AscentTerms> terms;
  for (const auto& [size, rho, adaptive, eta, decay] : groups) {
    terms.push_back({AscentGroup{0.0, adaptive, eta, decay}, scalar_of(rho, device, "rho")});
  }
  return terms;
}

std::vector<cuda::SgdTerms> sgd_terms(const std::vector<SgdTuple>& groups, Device device) {
  std::vector<cuda::SgdTerms> terms;
  for (const auto& [size, lr, momentum, dampening, weight_decay, nesterov, maximize, first] : groups) {
    const SgdGroup group{0.0, momentum, dampening, weight_decay, nesterov, maximize, first};
    terms.push_back({group, scalar_of(lr, device, "lr")});
  }
  return terms;
}

std::vector<cuda::AdamTerms> adam_terms(const std::vector<AdamTuple>& groups, Device device) {
  std::vector<cuda::AdamTerms> terms;
  for (const auto& [size, lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize, first, correction1,
                    correction2_root] : groups) {
    const AdamGroup group{0.0,       beta1,   beta2,    eps,  weight_decay, correction1, correction2_root,
                          decoupled, amsgrad, maximize, first};
    terms.push_back({group, scalar_of(lr, device, "lr")});
  }
  return terms;
}

// Of device numbers of one dtype; null for None.
template <class T>
T* pointer_of(const py::object& tensor, Device device, DType dtype, int64_t least, const char* name) {
  if (tensor.is_none()) return nullptr;
  TensorView view;
  if (!read_tensor(tensor.ptr(), device, &view) || view.dtype != dtype || view.numel < least || !is_dense(view)) {
    throw py::value_error(std::string("Invalid ") + name + ". Must be a tensor of at least " + std::to_string(least) +
                          (dtype == DType::f64 ? " float64" : " float32") + " on the device of the parameters.");
  }
  return static_cast<T*>(view.data);
}

constexpr int64_t kNormNumbers = sizeof(Norm) / sizeof(double);

// `workspace`: float64 of 3 + norm_partials() elements; the first three come to hold the Norm.
void norm(Batch& batch, const std::vector<AscentTuple>& groups, double q, const py::object& workspace,
          uintptr_t stream) {
  const auto& tensors = batch.gather(sizes_of(groups));
  const int64_t least = kNormNumbers + cuda::norm_partials(tensors, q);
  auto* numbers = pointer_of<double>(workspace, batch.device(), DType::f64, least, "workspace");
  if (numbers == nullptr) throw py::value_error("Invalid workspace=None. Must be a tensor.");
  const auto terms = ascent_terms(groups, batch.device());
  const cuda::Target target = target_of(batch, stream);
  const py::gil_scoped_release unlocked;  // a full queue of launches must not stop other threads
  cuda::norm(target, tensors, terms, q, numbers + kNormNumbers, reinterpret_cast<Norm*>(numbers));
}

int64_t norm_partials(Batch& batch, const std::vector<AscentTuple>& groups, double q) {
  return cuda::norm_partials(batch.gather(sizes_of(groups)), q);
}

void perturb(Batch& batch, const py::object& norm, const std::vector<AscentTuple>& groups, double q, uintptr_t stream,
             py::list journal, const py::object& entry) {
  const auto& tensors = batch.gather(sizes_of(groups));
  require_backups(tensors);
  const int64_t least = q == 1.0 || q == 2.0 ? 1 : kNormNumbers;
  const auto* value = pointer_of<const Norm>(norm, batch.device(), DType::f64, least, "norm");
  if (value == nullptr) throw py::value_error("Invalid norm=None. Must be a tensor.");
  const auto terms = ascent_terms(groups, batch.device());
  const cuda::Target target = target_of(batch, stream);
  // Entered before the first launch: where a later one fails, what the others have displaced can be brought back.
  journal.append(entry);
  size_t displaced = 0;
  try {
    const py::gil_scoped_release unlocked;
    cuda::perturb(target, tensors, terms, q, value, &displaced);
  } catch (...) {
    batch.keep_backups(displaced);
    if (displaced == 0) journal.attr("pop")();
    throw;
  }
  batch.keep_backups();
}

void restore(Batch& batch, Py_ssize_t size, uintptr_t stream) {
  batch.refresh();
  const auto& tensors = batch.gather({size});
  const cuda::Target target = target_of(batch, stream);
  const py::gil_scoped_release unlocked;
  cuda::restore(target, tensors);
}

void sgd_update(Batch& batch, const std::vector<SgdTuple>& groups, const py::object& grad_scale,
                const py::object& found_inf, uintptr_t stream, py::list journal) {
  const auto& tensors = batch.gather(sizes_of(groups));
  const auto terms = sgd_terms(groups, batch.device());
  require_momentum(tensors, [&](size_t group) -> const SgdGroup& { return terms[group].group; });
  const auto* scale = pointer_of<const float>(grad_scale, batch.device(), DType::f32, 1, "grad_scale");
  const auto* inf = pointer_of<const float>(found_inf, batch.device(), DType::f32, 1, "found_inf");
  const cuda::Target target = target_of(batch, stream);
  {
    const py::gil_scoped_release unlocked;
    cuda::sgd_update(target, tensors, terms, scale, inf);
  }
  journal.attr("clear")();
}

void adam_update(Batch& batch, const std::vector<AdamTuple>& groups, const py::object& steps,
                 const py::object& grad_scale, const py::object& found_inf, uintptr_t stream, py::list journal) {
  batch.read_steps(steps);
  const auto& tensors = batch.gather(sizes_of(groups));
  const auto terms = adam_terms(groups, batch.device());
  require_adam_state(tensors, [&](size_t group) -> const AdamGroup& { return terms[group].group; });
  const auto* scale = pointer_of<const float>(grad_scale, batch.device(), DType::f32, 1, "grad_scale");
  const auto* inf = pointer_of<const float>(found_inf, batch.device(), DType::f32, 1, "found_inf");
  const cuda::Target target = target_of(batch, stream);
  {
    const py::gil_scoped_release unlocked;
    cuda::adam_update(target, tensors, terms, scale, inf);
  }
  journal.attr("clear")();
}

}  // namespace

void bind_cuda(py::module_& module) {
  py::module_ m = module.def_submodule("cuda", "The CUDA kernels; on CPU tensors they are interpreted.");
  m.def("why_not", &cuda::why_not);
  m.def("architectures", &cuda::architectures);
  m.def("driver_why_not", &cuda::driver_why_not);
  m.def("architecture_why_not", &cuda::architecture_why_not);
  m.def("units", [](const std::vector<int64_t>& numels, bool grouped) {
    std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> places;
    for (const auto& unit : cuda::units(numels, grouped)) {
      places.emplace_back(unit.launch, unit.tensor, unit.begin, unit.count);
    }
    return places;
  });
  m.def("norm_partials", &norm_partials);
  m.def("norm", &norm);
  m.def("perturb", &perturb);
  m.def("restore", &restore);
  m.def("sgd_update", &sgd_update);
  m.def("adam_update", &adam_update);
}

}  // namespace fused_sam
