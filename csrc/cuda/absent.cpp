// In place of the *.cu files, in builds without CUDA.
#include <stdexcept>

#include "ops.h"

namespace fused_sam::cuda {

const char* architectures() {
  return "";
}

std::string why_not(int) {
  return "this build of the native core has no CUDA part";
}

namespace device {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error("FusedSAM: " + why_not(-1) + ".");
}

}  // namespace

size_t capacity() {
  refuse();
}
void norm(const Target&, const Slice<AscentTerms>&, int, const NormTerms&) {
  refuse();
}
void peak(const Target&, const Slice<AscentTerms>&, int, const NormTerms&) {
  refuse();
}
void powers(const Target&, const Slice<AscentTerms>&, int, const NormTerms&) {
  refuse();
}
void clear(const Target&, Norm*) {
  refuse();
}
void power_perturb(const Target&, const Slice<AscentTerms>&, int, const PerturbTerms&) {
  refuse();
}
void perturb(const Target&, const Slice<AscentTerms>&, int, const PerturbTerms&) {
  refuse();
}
void accumulate(const Target&, const Slice<MeanTerms>&, int, const MeanUnits&) {
  refuse();
}
void sgd_update(const Target&, const Slice<SgdTerms>&, int, const UpdateTerms&) {
  refuse();
}
void adam_update(const Target&, const Slice<AdamTerms>&, int, const UpdateTerms&) {
  refuse();
}

}  // namespace device
}  // namespace fused_sam::cuda
