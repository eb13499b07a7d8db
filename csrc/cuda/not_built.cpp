// In place of the *.cu files and launch.cpp, in builds without CUDA.
#include <stdexcept>

#include "launch.h"

namespace fused_sam::cuda {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error("FusedSAM: " + why_not(-1) + ".");
}

using Tensors = std::vector<Tensor>;
template <class Terms>
using Groups = std::vector<Terms>;

}  // namespace

const char* architectures() {
  return "";
}

std::string why_not(int) {
  return "this build of the native core has no CUDA part";
}

void norm(const Target&, const Tensors&, const Groups<AscentTerms>&, double, double*, Norm*) {
  refuse();
}

void perturb(const Target&, const Tensors&, const Groups<AscentTerms>&, double, const Norm*, size_t*) {
  refuse();
}

void restore(const Target&, const Tensors&) {
  refuse();
}

void restore_accumulate(const Target&, const Tensors&, const Groups<AccumulateTerms>&) {
  refuse();
}

void sgd_update(const Target&, const Tensors&, const Groups<SgdTerms>&, const float*, const float*) {
  refuse();
}

void adam_update(const Target&, const Tensors&, const Groups<AdamTerms>&, const float*, const float*) {
  refuse();
}

}  // namespace fused_sam::cuda
