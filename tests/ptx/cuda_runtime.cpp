// The symbols of the CUDA runtime that nvcc's host code and csrc/cuda/ call. Types are spelled out, so that building it
// needs no toolkit.
#include <cstring>

#include "machine.h"
#include "runtime.h"

namespace {

using namespace ptx;

enum Error : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidConfiguration = 9,
  kInvalidDeviceFunction = 98,
  kInvalidDevice = 101,
  kIllegalAddress = 700,
  kLaunchFailure = 719,
};

int kept_error = kSuccess;

int keep(int error) {
  if (error != kSuccess) kept_error = error;
  return error;
}

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> by_host_function;
  return by_host_function;
}

const Kernel* kernel_of(const void* host_function) {
  const auto found = kernels().find(host_function);
  return found == kernels().end() ? nullptr : &found->second;
}

int launch_kernel(const Kernel* kernel, const Size& blocks, const Size& threads, void** arguments, size_t shared) {
  if (kernel == nullptr) return keep(kInvalidDeviceFunction);
  if (runtime.good_launches >= 0 && runtime.good_launches-- == 0) return keep(kLaunchFailure);
  const Function& function = *kernel->function;
  const uint32_t most_bytes = runtime.driver_version >= 12010 ? 32764 : 4096;
  if (!is_valid(function, blocks, threads) || function.parameter_bytes > most_bytes) return keep(kInvalidConfiguration);
  const std::shared_ptr<char> parameters = parameter_buffer(function);
  for (size_t i = 0; i < function.parameters.size(); ++i) {
    std::memcpy(parameters.get() + function.parameters[i].offset, arguments[i], function.parameters[i].size);
  }
  const Launch launch{*kernel, blocks, threads, shared, parameters};
  if (runtime.captures) {
    runtime.graph.push_back(launch);
    return kSuccess;
  }
  return keep(run_all({launch}, false) ? kSuccess : kIllegalAddress);
}

// A fat binary is a header and entries; PTX is an entry of kind 1, here without compression.
std::string ptx_inside(const char* fat_binary) {
  const auto read = [](const char* at, auto number) {
    std::memcpy(&number, at, sizeof(number));
    return number;
  };
  const auto header = read(fat_binary + 6, uint16_t{});
  const char* const end = fat_binary + header + read(fat_binary + 8, uint64_t{});
  const char* entry = fat_binary + header;
  while (entry < end) {
    const auto kind = read(entry, uint16_t{});
    const auto begin = read(entry + 4, uint32_t{});
    const auto bytes = read(entry + 8, uint64_t{});
    if (kind == 1) return std::string(entry + begin, strnlen(entry + begin, bytes));
    entry += begin + bytes;
  }
  return "";
}

struct Configuration {
  Size blocks, threads;
  size_t shared;
  void* stream;
};
Configuration pushed;

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  const char* binary = nullptr;
  std::memcpy(&binary, static_cast<char*>(wrapper) + 8, sizeof(binary));
  return reinterpret_cast<void**>(load(ptx_inside(binary)));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** handle, const char* host_function, char*, const char* name, int, void*, void*, void*,
                            void*, int*) {
  const auto* module = reinterpret_cast<const Module*>(handle);
  if (module == nullptr) return;
  const auto found = module->numbers.find(name);
  if (found == module->numbers.end()) return report(std::string("no kernel ") + name);
  kernels()[host_function] = {module, module->functions[found->second].get()};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(Size blocks, Size threads, size_t shared, void* stream) {
  pushed = {blocks, threads, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Size* blocks, Size* threads, size_t* shared, void* stream) {
  *blocks = pushed.blocks;
  *threads = pushed.threads;
  *shared = pushed.shared;
  std::memcpy(stream, &pushed.stream, sizeof(pushed.stream));
  return kSuccess;
}
int __cudaGetKernel(const void** kernel, const void* host_function) {
  *kernel = kernel_of(host_function);
  return *kernel == nullptr ? keep(kInvalidDeviceFunction) : kSuccess;
}
int __cudaLaunchKernel(const void* kernel, Size blocks, Size threads, void** arguments, size_t shared, void*) {
  return launch_kernel(static_cast<const Kernel*>(kernel), blocks, threads, arguments, shared);
}
int cudaLaunchKernel(const void* host_function, Size blocks, Size threads, void** arguments, size_t shared, void*) {
  return launch_kernel(kernel_of(host_function), blocks, threads, arguments, shared);
}

int cudaGetLastError() {
  const int error = kept_error;
  kept_error = kSuccess;
  return error;
}
const char* cudaGetErrorString(int error) {
  return error == kIllegalAddress ? "an illegal memory access was encountered" : "a launch failed in the emulator";
}
const char* cudaGetErrorName(int error) {
  return error == kIllegalAddress ? "cudaErrorIllegalAddress" : "cudaErrorLaunchFailure";
}
// -1 is that of CPU tensors, which a driver would refuse.
int cudaSetDevice(int device) {
  return device <= 0 ? kSuccess : keep(kInvalidDevice);
}
int cudaGetDeviceCount(int* count) {
  *count = 1;
  return kSuccess;
}
int cudaDriverGetVersion(int* version) {
  *version = runtime.driver_version;
  return kSuccess;
}
int cudaDeviceGetAttribute(int* value, int, int) {
  *value = 0;
  return kSuccess;
}
int cudaFuncGetAttributes(void*, const void* host_function) {
  return kernel_of(host_function) == nullptr ? keep(kInvalidDeviceFunction) : kSuccess;
}
int cudaMemsetAsync(void* memory, int value, size_t bytes, void*) {
  std::memset(memory, value, bytes);
  return kSuccess;
}
int cudaStreamIsCapturing(void*, int* status) {
  *status = runtime.captures ? 1 : 0;
  return kSuccess;
}

}  // extern "C"
