#include "columns.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;

namespace fused_sam {
namespace {

template <class NumberOf>
py::bytes column(const Batch& batch, const NumberOf& number_of) {
  const std::vector<Tensor>& tensors = batch.tensors();
  std::vector<int64_t> numbers;
  numbers.reserve(tensors.size());
  for (const Tensor& t : tensors) numbers.push_back(number_of(t));
  return py::bytes(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t));
}

int64_t address(const void* data) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
}

py::bytes addresses(const Batch& batch, const std::string& of) {
  if (of == "params") return column(batch, [](const Tensor& t) { return address(t.param); });
  if (of == "grads") return column(batch, [](const Tensor& t) { return address(t.grad); });
  if (of == "backups") return column(batch, [](const Tensor& t) { return address(t.backup); });
  throw py::value_error("Invalid of='" + of + "'. Must be params, grads or backups.");
}

void require_known(size_t k) {
  if (k >= kStates) {
    throw py::value_error("Invalid k=" + std::to_string(k) + ". Must be < " + std::to_string(kStates) + ".");
  }
}

py::bytes state_addresses(const Batch& batch, size_t k) {
  require_known(k);
  return column(batch, [k](const Tensor& t) { return address(t.state[k]); });
}

py::bytes sizes(const Batch& batch) {
  return column(batch, [](const Tensor& t) { return t.numel; });
}

// dtype of the parameter << 2 | dtype of its gradient, or of its backup, which is that of the parameter; -1 without.
py::bytes kinds(const Batch& batch, bool with_grads, bool with_backups) {
  return column(batch, [=](const Tensor& t) -> int64_t {
    const auto param = static_cast<int64_t>(t.dtype);
    if (with_grads && t.grad != nullptr) return param << 2 | static_cast<int64_t>(t.grad_dtype);
    return with_backups && t.backup != nullptr ? param << 2 | param : -1;
  });
}

void require_state_of(Batch& batch, const std::vector<int64_t>& sizes, size_t k, const std::vector<bool>& needed) {
  require_known(k);
  if (needed.size() != sizes.size()) {
    throw py::value_error("Invalid len(needed)=" + std::to_string(needed.size()) +
                          ". Must be that of sizes: " + std::to_string(sizes.size()) + ".");
  }
  require_state(batch.gather(sizes), static_cast<int>(k), [&](size_t group) { return needed[group]; });
}

}  // namespace

void bind_columns(py::class_<Batch>& batch) {
  batch.def("addresses", &addresses)
      .def("state_addresses", &state_addresses)
      .def("sizes", &sizes)
      .def("kinds", &kinds)
      .def("check", [](Batch& self, const std::vector<int64_t>& sizes) { self.gather(sizes); })
      .def("require_state", &require_state_of)
      .def("require_backups",
           [](Batch& self, const std::vector<int64_t>& sizes) { require_backups(self.gather(sizes)); })
      .def("keep_backups", &Batch::keep_backups, pybind11::arg("displaced") = SIZE_MAX)
      .def("refresh", &Batch::refresh);
}

}  // namespace fused_sam
