#include "accumulate.h"

#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "../cuda/launch.h"
#include "cuda_ops.h"
#include "gather.h"

namespace py = pybind11;

namespace fused_sam {
namespace {

// Field order of fused_sam.ops.MeanGroup.
using MeanTuple = std::tuple<int64_t, double, bool>;

template <class Terms>
std::vector<Terms> mean_groups(const std::vector<MeanTuple>& groups) {
  std::vector<Terms> converted;
  for (const auto& [size, weight, first] : groups) converted.push_back({MeanGroup{weight, first}});
  if (converted.empty()) converted.push_back({});  // that of the parameters to restore, which is not read
  return converted;
}

// The means, as parameters that have gradients, and behind them the parameters of `restored`, a Batch of an ascent of
// `size` parameters, or None.
std::vector<Tensor> joined(Batch& means, const std::vector<MeanTuple>& groups, const py::object& restored,
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

// As the updates, enters what the kernel has done in the journal before it returns.
void on_cpu(Batch& means, const py::object& restored, Py_ssize_t size, const std::vector<MeanTuple>& groups,
            int threads, py::list journal) {
  if (!means.device().cpu()) throw py::value_error("Invalid tensors. Must be on the CPU.");
  const auto tensors = joined(means, groups, restored, size);
  const auto converted = mean_groups<MeanGroup>(groups);
  {
    py::gil_scoped_release unlocked;
    cpu::restore_accumulate(tensors.data(), tensors.size(), converted.data(), threads);
  }
  journal.attr("clear")();
}

void on_device(Batch& means, const py::object& restored, Py_ssize_t size, const std::vector<MeanTuple>& groups,
               uintptr_t stream, py::list journal) {
  const auto tensors = joined(means, groups, restored, size);
  const auto converted = mean_groups<cuda::MeanTerms>(groups);
  const cuda::Target target = target_of(means, stream);
  {
    const py::gil_scoped_release unlocked;
    cuda::restore_accumulate(target, tensors, converted);
  }
  journal.attr("clear")();
}

}  // namespace

void bind_accumulate(py::module_& module) {
  module.def("restore_accumulate", &on_cpu);
  module.attr("cuda").cast<py::module_>().def("restore_accumulate", &on_device);
}

}  // namespace fused_sam
