// What this build and this machine can do.
#include "launch.cuh"

namespace fused_sam::cuda {
namespace {

__global__ void probe() {}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string loaded_driver_why_not() {
  const std::string reason = driver_why_not(driver_version(), CUDART_VERSION);
  if (!reason.empty()) return reason;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess ? "" : std::string("the NVIDIA driver says: ") + cudaGetErrorString(error);
}

}  // namespace

const char* architectures() {
  return FUSED_SAM_ARCHITECTURES;
}

std::string why_not(int device) {
  const std::string driver = loaded_driver_why_not();
  if (!driver.empty() || device < 0) return driver;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction) {
    return std::string("CUDA says of device ") + std::to_string(device) + ": " + cudaGetErrorString(error);
  }
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return architecture_why_not(architectures(), std::to_string(major) + std::to_string(minor), device);
}

size_t launch_capacity() {
  return static_cast<size_t>(driver_version() >= 12010 ? kMostPayload : kSmallPayload);
}

}  // namespace fused_sam::cuda
