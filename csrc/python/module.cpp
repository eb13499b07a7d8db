// The Python module: names only. Private to fused_sam.backends.native, which is private to fused_sam.ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../cuda/launch.h"
#include "../kernels.h"
#include "batch.h"
#include "columns.h"
#include "lists.h"
#include "ops.h"
#include "tensor_view.h"
#include "torch_api.h"

namespace py = pybind11;
using namespace fused_sam;

namespace {

// The index of the first entry that is there, or None.
template <class Entries, class IsThere>
py::object first_of(const Entries& entries, const IsThere& is_there) {
  const auto found = std::find_if(entries.begin(), entries.end(), is_there);
  if (found == entries.end()) return py::none();
  return py::int_(std::distance(entries.begin(), found));
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

std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> units(const std::vector<int64_t>& numels, bool grouped) {
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> places;
  for (const auto& unit : cuda::units(numels, grouped)) {
    places.emplace_back(unit.launch, unit.tensor, unit.begin, unit.count);
  }
  return places;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  TorchApi::get();  // here, where no other thread can wait for it
  m.doc() = "Compiled kernels of FusedSAM. Private: use fused_sam.ops, which checks its arguments.";
  m.def("isa", &cpu::isa_name);
  m.def("read_through", &TorchApi::read_through);
  m.def("clear_grads", &clear_grads);
  m.def("lookup", &lookup);
  m.def("all_present", &all_present);
  m.def("all_present", [](const Gradients& grads) { return grads.all_present(); });
  m.def("first_present", [](const py::list& entries) {
    return first_of(entries, [](const py::handle& entry) { return !entry.is_none(); });
  });
  m.def("has_grad", [](const py::object& param) { return HeldTensor::grad_of(param.ptr()).defined(); });
  m.def("first_present", [](const Gradients& grads) {
    return first_of(grads, [](const HeldTensor& entry) { return entry.defined(); });
  });
  m.def("presence", [](const py::list& entries) { return entries; });
  m.def("presence", [](const Gradients& grads) { return grads.presence(); });
  m.def("increment_version", &increment_version);
  m.def("empty_number", [] {
    PyObject* number = TorchApi::get().empty_number();
    if (number == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(number);
  });
  m.def("stream_copy", &stream_copy);
  py::class_<Batch> batch(m, "Batch");
  batch
      .def(py::init<const py::list&, const py::object&, const py::object&, const py::tuple&, const py::object&, int,
                    int, bool>())
      .def_property_readonly("unsupported", &Batch::unsupported)
      .def_property_readonly("has_backup", &Batch::has_backup)
      .def_property_readonly("memory", &Batch::memory)
      .def("make_backups", &Batch::make_backups)
      .def("set_backups", &Batch::set_backups);
  bind_gradients(m);
  bind_ops(batch);
  bind_columns(batch);
  py::module_ cuda = m.def_submodule("cuda", "What of the CUDA kernels is no op.");
  cuda.def("why_not", &cuda::why_not);
  cuda.def("architectures", &cuda::architectures);
  cuda.def("driver_why_not", &cuda::driver_why_not);
  cuda.def("architecture_why_not", &cuda::architecture_why_not);
  cuda.def("units", &units);
}
