// In place of the *.cu files, in builds without CUDA.
#include <stdexcept>

#include "targets.h"

namespace fused_sam::cuda {

const char* architectures() {
  return "";
}

std::string why_not(int) {
  return "this build of the native core has no CUDA part";
}

const Ops& device_ops() {
  throw std::runtime_error("FusedSAM: " + why_not(-1) + ".");
}

}  // namespace fused_sam::cuda
