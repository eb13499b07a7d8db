// Why a build with CUDA cannot be used, in sentences.
#include "launch.h"

namespace fused_sam::cuda {

std::string driver_why_not(int driver, int toolkit) {
  const auto name = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  if (driver == 0) return "no NVIDIA driver is loaded on this machine";
  // Any driver of the toolkit's major version runs its code.
  if (driver / 1000 >= toolkit / 1000) return "";
  return "the NVIDIA driver supports CUDA " + name(driver) + ", but the kernels were built with CUDA " + name(toolkit) +
         ": update the driver, or rebuild with an nvcc of CUDA " + std::to_string(driver / 1000);
}

std::string architecture_why_not(const std::string& built_for, const std::string& capability, int device) {
  return "the kernels were built for " + built_for + ", not for sm_" + capability + " of device " +
         std::to_string(device) + ": reinstall with FUSED_SAM_CUDA_ARCHITECTURES=" + capability;
}

}  // namespace fused_sam::cuda
