// The Python module: argument conversion only. Private to fused_sam.backends.native, which is private to fused_sam.ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "kernels.h"
#include "python/accumulate.h"
#include "python/columns.h"
#include "python/cuda_ops.h"
#include "python/gather.h"
#include "python/param_lists.h"
#include "python/tensor_view.h"
#include "python/torch_api.h"

namespace py = pybind11;
using namespace fused_sam;

namespace {

// Field order of fused_sam.ops.AscentGroup, SGDGroup and AdamGroup.
using AscentTuple = std::tuple<int64_t, double, bool, double, double>;
using SgdTuple = std::tuple<int64_t, double, double, double, double, bool, bool, bool>;
using AdamTuple = std::tuple<int64_t, double, double, double, double, double, bool, bool, bool, bool, double, double>;

std::vector<AscentGroup> ascent_groups(const std::vector<AscentTuple>& groups) {
  std::vector<AscentGroup> converted;
  for (const auto& [size, rho, adaptive, eta, decay] : groups) converted.push_back({rho, adaptive, eta, decay});
  return converted;
}

std::vector<SgdGroup> sgd_groups(const std::vector<SgdTuple>& groups) {
  std::vector<SgdGroup> converted;
  for (const auto& [size, lr, momentum, dampening, weight_decay, nesterov, maximize, first] : groups) {
    converted.push_back({lr, momentum, dampening, weight_decay, nesterov, maximize, first});
  }
  return converted;
}

std::vector<AdamGroup> adam_groups(const std::vector<AdamTuple>& groups) {
  std::vector<AdamGroup> converted;
  for (const auto& [size, lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize, first, correction1,
                    correction2_root] : groups) {
    converted.push_back(
        {lr, beta1, beta2, eps, weight_decay, correction1, correction2_root, decoupled, amsgrad, maximize, first});
  }
  return converted;
}

const std::vector<Tensor>& on_cpu(Batch& batch, const std::vector<int64_t>& sizes) {
  if (!batch.device().cpu()) throw py::value_error("Invalid tensors. Must be on the CPU.");
  return batch.gather(sizes);
}

using NormTuple = std::tuple<double, double, double>;  // the fields of Norm

NormTuple norm(Batch& batch, const std::vector<AscentTuple>& groups, double q, int threads) {
  const auto& tensors = on_cpu(batch, sizes_of(groups));
  const auto converted = ascent_groups(groups);
  py::gil_scoped_release unlocked;
  const Norm result = cpu::norm(tensors.data(), tensors.size(), converted.data(), q, threads);
  return {result.value, result.tensor, result.element};
}

// Python handles a pending signal as soon as a call returns, so what a kernel has done is entered in the journal before
// it returns: an interrupt can then never come between the two.
void perturb(Batch& batch, const NormTuple& norm, const std::vector<AscentTuple>& groups, double q, int threads,
             py::list journal, const py::object& entry) {
  const auto& tensors = on_cpu(batch, sizes_of(groups));
  require_backups(tensors);
  const auto converted = ascent_groups(groups);
  {
    py::gil_scoped_release unlocked;
    const Norm given{std::get<0>(norm), std::get<1>(norm), std::get<2>(norm)};
    cpu::perturb(tensors.data(), tensors.size(), converted.data(), q, given, threads);
  }
  batch.keep_backups();
  journal.append(entry);
}

void restore(Batch& batch, Py_ssize_t size, int threads) {
  batch.refresh();
  const auto& tensors = on_cpu(batch, {size});
  py::gil_scoped_release unlocked;
  cpu::restore(tensors.data(), tensors.size(), threads);
}

void sgd_update(Batch& batch, const std::vector<SgdTuple>& groups, double grad_multiplier, int threads,
                py::list journal) {
  const auto& tensors = on_cpu(batch, sizes_of(groups));
  const auto converted = sgd_groups(groups);
  require_momentum(tensors, [&](size_t group) -> const SgdGroup& { return converted[group]; });
  {
    py::gil_scoped_release unlocked;
    cpu::sgd_update(tensors.data(), tensors.size(), converted.data(), grad_multiplier, threads);
  }
  journal.attr("clear")();
}

void adam_update(Batch& batch, const std::vector<AdamTuple>& groups, const py::object& steps, double grad_multiplier,
                 int threads, py::list journal) {
  batch.read_steps(steps);
  const auto& tensors = on_cpu(batch, sizes_of(groups));
  const auto converted = adam_groups(groups);
  require_adam_state(tensors, [&](size_t group) -> const AdamGroup& { return converted[group]; });
  {
    py::gil_scoped_release unlocked;
    cpu::adam_update(tensors.data(), tensors.size(), converted.data(), grad_multiplier, threads);
  }
  journal.attr("clear")();
}

void stream_copy(const py::object& dst, const py::object& src, int threads) {
  TensorView to, from;
  const Device cpu{dlpack::kCpu, 0};
  if (!read_tensor(dst.ptr(), cpu, &to) || !read_tensor(src.ptr(), cpu, &from) || !is_dense(to) ||
      !same_layout(to, from) || to.dtype != from.dtype) {
    throw py::value_error("Invalid dst, src. Must be dense CPU tensors of one floating dtype, shape and layout.");
  }
  py::gil_scoped_release unlocked;
  cpu::stream_copy(to.data, from.data, to.numel * size_of(to.dtype), threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  TorchApi::get();  // here, where no other thread can wait for it
  m.doc() = "Compiled kernels of FusedSAM. Private: use fused_sam.ops, which checks its arguments.";
  m.def("isa", &cpu::isa_name);
  m.def("get_grads", &get_grads);
  m.def("clear_grads", &clear_grads);
  m.def("lookup", &lookup);
  m.def("all_present", &all_present);
  py::class_<Batch> batch(m, "Batch");
  batch
      .def(py::init<const py::list&, const py::object&, const py::object&, const py::tuple&, const py::object&, int,
                    int>())
      .def_property_readonly("odd", &Batch::odd)
      .def_property_readonly("kept", &Batch::kept)
      .def("make_backups", &Batch::make_backups)
      .def("set_backups", &Batch::set_backups)
      .def("norm", &norm)
      .def("perturb", &perturb)
      .def("restore", &restore)
      .def("sgd_update", &sgd_update)
      .def("adam_update", &adam_update);
  bind_columns(batch);
  m.def("stream_copy", &stream_copy);
  bind_cuda(m);
  bind_accumulate(m);
}
