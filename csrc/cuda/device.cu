// What this build and this machine can do.
#include "kernels.cuh"

namespace fused_sam::cuda {
namespace {

__global__ void probe() {}

std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string driver_why_not() {
  const int driver = driver_version();
  if (driver == 0) return "no NVIDIA driver is loaded on this machine";
  // Any driver of the toolkit's major version runs its code.
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the NVIDIA driver supports CUDA " + version_name(driver) + ", but the kernels were built with CUDA " +
           version_name(CUDART_VERSION) + ": update the driver, or rebuild with an nvcc of CUDA " +
           std::to_string(driver / 1000);
  }
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? "" : std::string("the NVIDIA driver says: ") + cudaGetErrorString(error);
}

}  // namespace

const char* architectures() {
  return FUSED_SAM_ARCHITECTURES;
}

std::string why_not(int device) {
  const std::string driver = driver_why_not();
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
  const std::string arch = std::to_string(major) + std::to_string(minor);
  return "the kernels were built for " + std::string(architectures()) + ", not for sm_" + arch + " of device " +
         std::to_string(device) + ": reinstall with FUSED_SAM_CUDA_ARCHITECTURES=" + arch;
}

size_t device::capacity() {
  static const size_t bytes = driver_version() >= 12010 ? kMostPayload : kSmallPayload;
  return bytes;
}

}  // namespace fused_sam::cuda
