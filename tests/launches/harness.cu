// launch.cuh on the runtime of runtime.cpp: what an error of a launch leaves behind.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/cuda/launch.cuh"
#include "runtime.h"

using namespace fused_sam;
using namespace fused_sam::cuda;

namespace {

void require(bool condition, const char* promise) {
  if (condition) return;
  std::printf("broken: %s\n", promise);
  std::exit(1);
}

std::string error_of(const Target& target, const WorkList<AscentTerms>& list) {
  static const char kernel = 0;
  try {
    launch(&kernel, target, list, PerturbTerms{2.0, nullptr}, "perturb");
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

int main() {
  const Target target{0, nullptr}, elsewhere{1, nullptr};
  WorkList<AscentTerms> list(kMinShift);
  Tensor tensor{};
  tensor.numel = 5000;
  list.add(tensor, {AscentTerms{}});
  list.finish();

  next = cudaErrorInvalidConfiguration;
  require(error_of(target, list) == "CUDA error in perturb: the stand-in's error (cudaErrorStandIn).",
          "a launch that fails says so itself");
  require(kept == cudaSuccess, "its error is cleared");
  require(error_of(target, list).empty() && launched_blocks == 3, "the launch after it is made");
  require(!error_of(elsewhere, list).empty() && kept == cudaSuccess, "so it is with the error of a device");
  kept = cudaErrorUnknown;
  require(error_of(target, list).empty(), "an error of another program's call is no launch's");
  std::puts("ok");
}
