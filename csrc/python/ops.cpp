// Each op, bound once. A batch says which kernels take it; `on` is the number of threads for those of the CPU, and a
// stream (cudaStream_t) for those of CUDA.
#include "ops.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <climits>
#include <string>

#include "../cuda/launch.h"

namespace py = pybind11;

namespace fused_sam {
namespace {

// Field order of fused_sam.ops.AscentGroup, SGDGroup, AdamGroup and AccumulateGroup. rho and lr may be tensors.
using AscentTuple = std::tuple<int64_t, py::object, bool, double, double>;
using SgdTuple = std::tuple<int64_t, py::object, double, double, double, bool, bool, bool>;
using AdamTuple =
    std::tuple<int64_t, py::object, double, double, double, double, bool, bool, bool, bool, double, double>;
using AccumulateTuple = std::tuple<int64_t, double, bool>;

constexpr int64_t kNormNumbers = sizeof(Norm) / sizeof(double);

cuda::Scalar scalar_of(const py::object& value, Device device, const char* name) {
  if (PyFloat_Check(value.ptr()) || (PyNumber_Check(value.ptr()) && !py::hasattr(value, "data_ptr"))) {
    return {value.cast<double>(), nullptr, DType::f64};
  }
  TensorView view;
  if (!read_tensor(value.ptr(), device, &view) || view.numel != 1) {
    throw py::value_error(std::string("Invalid ") + name +
                          ". Must be a number, or a floating tensor of one element on the device of the parameters.");
  }
  return {0.0, view.data, view.dtype};
}

std::vector<cuda::AscentTerms> terms_of(const std::vector<AscentTuple>& groups, Device device) {
  std::vector<cuda::AscentTerms> terms;
  for (const auto& [size, rho, adaptive, eta, decay] : groups) {
    terms.push_back({AscentGroup{0.0, adaptive, eta, decay}, scalar_of(rho, device, "rho")});
  }
  return terms;
}

std::vector<cuda::SgdTerms> terms_of(const std::vector<SgdTuple>& groups, Device device) {
  std::vector<cuda::SgdTerms> terms;
  for (const auto& [size, lr, momentum, dampening, weight_decay, nesterov, maximize, first] : groups) {
    const SgdGroup group{0.0, momentum, dampening, weight_decay, nesterov, maximize, first};
    terms.push_back({group, scalar_of(lr, device, "lr")});
  }
  return terms;
}

std::vector<cuda::AdamTerms> terms_of(const std::vector<AdamTuple>& groups, Device device) {
  std::vector<cuda::AdamTerms> terms;
  for (const auto& [size, lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize, first, correction1,
                    correction2_root] : groups) {
    const AdamGroup group{0.0,       beta1,   beta2,    eps,  weight_decay, correction1, correction2_root,
                          decoupled, amsgrad, maximize, first};
    terms.push_back({group, scalar_of(lr, device, "lr")});
  }
  return terms;
}

std::vector<cuda::AccumulateTerms> terms_of(const std::vector<AccumulateTuple>& groups, Device) {
  std::vector<cuda::AccumulateTerms> terms;
  for (const auto& [size, weight, first] : groups) terms.push_back({AccumulateGroup{weight, first}});
  if (terms.empty()) terms.push_back({});  // that of the parameters to restore, which is not read
  return terms;
}

AscentGroup on_cpu(const cuda::AscentTerms& terms) {
  AscentGroup group = terms.group;
  group.rho = terms.rho.read();
  return group;
}

template <class Terms>
auto on_cpu(const Terms& terms) {
  auto group = terms.group;
  group.lr = terms.lr.read();
  return group;
}

AccumulateGroup on_cpu(const cuda::AccumulateTerms& terms) {
  return terms.group;
}

// The groups as the kernels of the CPU take them.
template <class Terms>
auto on_cpu(const std::vector<Terms>& terms) {
  std::vector<decltype(on_cpu(terms[0]))> groups;
  for (const Terms& one : terms) groups.push_back(on_cpu(one));
  return groups;
}

// Numbers of one dtype where the parameters are; null for None.
template <class T>
T* pointer_of(const py::object& tensor, Device device, DType dtype, int64_t least, const char* name,
              int64_t* count = nullptr) {
  if (tensor.is_none()) return nullptr;
  TensorView view;
  if (!read_tensor(tensor.ptr(), device, &view) || view.dtype != dtype || view.numel < least || !is_dense(view)) {
    throw py::value_error(std::string("Invalid ") + name + ". Must be a tensor of at least " + std::to_string(least) +
                          (dtype == DType::f64 ? " float64" : " float32") + " on the device of the parameters.");
  }
  if (count != nullptr) *count = view.numel;
  return static_cast<T*>(view.data);
}

template <class T>
T* required(T* pointer, const char* name) {
  if (pointer == nullptr) throw py::value_error(std::string("Invalid ") + name + "=None. Must be a tensor.");
  return pointer;
}

// Calls the kernels that take a batch, on_cpu(threads) or on_target(target), while other Python threads may run: a full
// queue of launches must not stop them.
template <class CPU, class CUDA>
void run(const Batch& batch, int64_t on, const CPU& on_cpu, const CUDA& on_target) {
  const Device device = batch.device();
  if (!device.cpu() && !batch.for_gpu()) throw py::value_error("Invalid tensors. Must be on the CPU.");
  if (!device.cpu() && !device.cuda()) throw py::value_error("Invalid tensors. Must be on a CPU or CUDA device.");
  const py::gil_scoped_release unlocked;
  if (!batch.for_gpu()) {
    on_cpu(static_cast<int>(std::clamp<int64_t>(on, 1, INT_MAX)));
  } else {
    on_target(cuda::Target{device.cpu() ? -1 : device.index, reinterpret_cast<void*>(on)});
  }
}

// How many float64 numbers `norm` needs to work in beside the Norm itself.
int64_t norm_partials(Batch& batch, const std::vector<AscentTuple>& groups, double q) {
  const auto& tensors = batch.gather(sizes_of(groups));
  return batch.for_gpu() ? cuda::norm_partials(tensors, q) : 0;
}

// `workspace`: float64 of 3 + norm_partials() elements; the first three come to hold the Norm. On the CPU the norm's
// value may be all.
void norm(Batch& batch, const std::vector<AscentTuple>& groups, double q, const py::object& workspace, int64_t on) {
  const auto& tensors = batch.gather(sizes_of(groups));
  const auto terms = terms_of(groups, batch.device());
  const int64_t least = batch.for_gpu() ? kNormNumbers + cuda::norm_partials(tensors, q) : 1;
  int64_t count = 0;
  auto* numbers =
      required(pointer_of<double>(workspace, batch.device(), DType::f64, least, "workspace", &count), "workspace");
  run(
      batch, on,
      [&](int threads) {
        const Norm found = cpu::norm(tensors.data(), tensors.size(), on_cpu(terms).data(), q, threads);
        numbers[0] = found.value;
        if (count >= kNormNumbers) *reinterpret_cast<Norm*>(numbers) = found;
      },
      [&](const cuda::Target& target) {
        cuda::norm(target, tensors, terms, q, numbers + kNormNumbers, reinterpret_cast<Norm*>(numbers));
      });
}

// `norm`: what `norm` has left; of finite q its value may be all, and for q = 1 it may be None.
//
// The journal has the entry before the first launch: where a later one fails, what the others have displaced can be
// brought back. Python handles a pending signal when a call has returned, so that an interrupt finds the entry, too.
void perturb(Batch& batch, const py::object& norm, const std::vector<AscentTuple>& groups, double q, int64_t on,
             py::list journal, const py::object& entry) {
  const auto& tensors = batch.gather(sizes_of(groups));
  require_backups(tensors);
  const auto terms = terms_of(groups, batch.device());
  const int64_t least = q <= 1.7976931348623157e308 ? 1 : kNormNumbers;
  int64_t count = 0;
  const auto* found = pointer_of<const double>(norm, batch.device(), DType::f64, least, "norm", &count);
  if (q != 1.0) required(found, "norm");
  journal.append(entry);
  size_t displaced = 0;
  try {
    run(
        batch, on,
        [&](int threads) {
          Norm given{found == nullptr ? 0.0 : found[0], -1.0, -1.0};
          if (count >= kNormNumbers) given = *reinterpret_cast<const Norm*>(found);
          cpu::perturb(tensors.data(), tensors.size(), on_cpu(terms).data(), q, given, threads);
        },
        [&](const cuda::Target& target) {
          cuda::perturb(target, tensors, terms, q, reinterpret_cast<const Norm*>(found), &displaced);
        });
  } catch (...) {
    batch.keep_backups(displaced);
    if (displaced == 0) journal.attr("pop")();
    throw;
  }
  batch.keep_backups();
}

void restore(Batch& batch, Py_ssize_t size, int64_t on) {
  batch.refresh();
  const auto& tensors = batch.gather({size});
  run(
      batch, on, [&](int threads) { cpu::restore(tensors.data(), tensors.size(), threads); },
      [&](const cuda::Target& target) { cuda::restore(target, tensors); });
}

// Gradients are multiplied by 1 / *grad_scale; with a nonzero *found_inf parameters are only restored. The journal is
// cleared when that is done.
template <class Terms, class CPU, class CUDA>
void update(Batch& batch, const std::vector<Tensor>& tensors, const std::vector<Terms>& terms,
            const py::object& grad_scale, const py::object& found_inf, int64_t on, py::list& journal,
            const CPU& on_cpu_kernels, const CUDA& on_device) {
  const auto* scale = pointer_of<const float>(grad_scale, batch.device(), DType::f32, 1, "grad_scale");
  const auto* inf = pointer_of<const float>(found_inf, batch.device(), DType::f32, 1, "found_inf");
  run(
      batch, on,
      [&](int threads) {
        if (inf != nullptr && *inf != 0.0f) return cpu::restore(tensors.data(), tensors.size(), threads);
        const float multiplier = scale == nullptr ? 1.0f : 1.0f / *scale;
        on_cpu_kernels(tensors.data(), tensors.size(), on_cpu(terms).data(), multiplier, threads);
      },
      [&](const cuda::Target& target) { on_device(target, tensors, terms, scale, inf); });
  journal.attr("clear")();
}

void sgd_update(Batch& batch, const std::vector<SgdTuple>& groups, const py::object& grad_scale,
                const py::object& found_inf, int64_t on, py::list journal) {
  const auto& tensors = batch.gather(sizes_of(groups));
  const auto terms = terms_of(groups, batch.device());
  require_momentum(tensors, [&](size_t group) -> const SgdGroup& { return terms[group].group; });
  update(batch, tensors, terms, grad_scale, found_inf, on, journal, cpu::sgd_update, cuda::sgd_update);
}

void adam_update(Batch& batch, const std::vector<AdamTuple>& groups, const py::object& steps,
                 const py::object& grad_scale, const py::object& found_inf, int64_t on, py::list journal) {
  batch.read_steps(steps);
  const auto& tensors = batch.gather(sizes_of(groups));
  const auto terms = terms_of(groups, batch.device());
  require_adam_state(tensors, [&](size_t group) -> const AdamGroup& { return terms[group].group; });
  update(batch, tensors, terms, grad_scale, found_inf, on, journal, cpu::adam_update, cuda::adam_update);
}

// The means, as parameters that have gradients, and behind them the parameters of `restored`, a Batch of an ascent of
// `size` parameters, or None.
std::vector<Tensor> joined(Batch& means, const std::vector<AccumulateTuple>& groups, const py::object& restored,
                           Py_ssize_t size) {
  std::vector<Tensor> tensors = means.gather(sizes_of(groups));
  if (restored.is_none()) return tensors;
  Batch& params = restored.cast<Batch&>();
  if (params.device() != means.device()) {
    throw py::value_error("Invalid restored. Must be on the device of the means.");
  }
  params.refresh();
  for (Tensor t : params.gather({size})) {
    t.grad = nullptr;  // else it would be taken for a mean
    tensors.push_back(t);
  }
  return tensors;
}

void restore_accumulate(Batch& means, const py::object& restored, Py_ssize_t size,
                        const std::vector<AccumulateTuple>& groups, int64_t on, py::list journal) {
  const auto tensors = joined(means, groups, restored, size);
  const auto terms = terms_of(groups, means.device());
  run(
      means, on,
      [&](int threads) { cpu::restore_accumulate(tensors.data(), tensors.size(), on_cpu(terms).data(), threads); },
      [&](const cuda::Target& target) { cuda::restore_accumulate(target, tensors, terms); });
  journal.attr("clear")();
}

}  // namespace

void bind_ops(py::class_<Batch>& batch) {
  batch.def("norm_partials", &norm_partials)
      .def("norm", &norm)
      .def("perturb", &perturb)
      .def("restore", &restore)
      .def("restore_accumulate", &restore_accumulate)
      .def("sgd_update", &sgd_update)
      .def("adam_update", &adam_update);
}

}  // namespace fused_sam
