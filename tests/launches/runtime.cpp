#include "runtime.h"

cudaError_t kept = cudaSuccess;
cudaError_t next = cudaSuccess;
unsigned launched_blocks = 0;

namespace {

cudaError_t keep(cudaError_t error) {
  if (error != cudaSuccess) kept = error;
  return error;
}

}  // namespace

extern "C" {
cudaError_t CUDARTAPI cudaSetDevice(int device) {
  return keep(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t CUDARTAPI cudaGetLastError() {
  const cudaError_t error = kept;
  kept = cudaSuccess;
  return error;
}
cudaError_t CUDARTAPI cudaLaunchKernel(const void*, dim3 grid, dim3, void**, size_t, cudaStream_t) {
  launched_blocks = next == cudaSuccess ? grid.x : 0;
  const cudaError_t error = keep(next);
  next = cudaSuccess;
  return error;
}
const char* CUDARTAPI cudaGetErrorString(cudaError_t) {
  return "the stand-in's error";
}
const char* CUDARTAPI cudaGetErrorName(cudaError_t) {
  return "cudaErrorStandIn";
}
// What nvcc's host code calls before main.
void** __cudaRegisterFatBinary(void*) {
  return nullptr;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) {
  return 1;
}
}
