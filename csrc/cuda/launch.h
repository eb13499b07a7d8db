// The CUDA entry points, for callers without CUDA headers. Every op cuts its tensors into as few launches as kernel
// arguments allow, enqueues them on a stream and returns; nothing waits for the device and nothing is allocated. A
// build without CUDA throws (not_built.cpp).
#pragma once

#include <string>
#include <vector>

#include "terms.h"

namespace fused_sam::cuda {

// Where to run: a stream (cudaStream_t) of a device. That of CPU tensors is -1, which no driver knows: with it an op
// throws, but on the emulator of the tests.
struct Target {
  int device;
  void* stream;
};

// Why the kernels cannot run on a device, in one sentence; empty where they can. `device` < 0 asks without touching
// any device: only whether this build and the driver go together.
std::string why_not(int device);

// The two sentences of it that depend on nothing else: versions as cudaDriverGetVersion() gives them (0: no driver),
// and a compute capability without its dot.
std::string driver_why_not(int driver, int toolkit);
std::string architecture_why_not(const std::string& built_for, const std::string& capability, int device);

// "sm_75, sm_80, ...", or empty in a build without CUDA.
const char* architectures();

// Elements [begin, begin + count) of tensor number `tensor`, worked on by one warp of the launch number `launch`.
struct UnitPlace {
  int64_t launch, tensor, begin, count;
};

// How `perturb` cuts fp32 tensors of those sizes, one group each if `grouped`, as a device finds them: for tests.
std::vector<UnitPlace> units(const std::vector<int64_t>& numels, bool grouped);

// How many fp64 numbers `norm` needs to work in.
int64_t norm_partials(const std::vector<Tensor>& tensors, double q);

// *out = ||T g||_q, on the device; q > 1, possibly infinite. `partials` holds norm_partials() numbers; one or three per
// block, which are added in an order that depends on the sizes alone. One launch for q = 2 and infinity, else two.
void norm(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AscentTerms>& groups, double q,
          double* partials, Norm* out);

// As cpu::perturb, with the norm read on the device: its value, and for infinite q its place. *displaced tells how many
// tensors, from the first on, its launches cover so far: where one of them throws, the others have moved theirs.
void perturb(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AscentTerms>& groups, double q,
             const Norm* norm, size_t* displaced);

// As cpu::restore.
void restore(const Target& target, const std::vector<Tensor>& tensors);

// As cpu::restore_accumulate.
void restore_accumulate(const Target& target, const std::vector<Tensor>& tensors,
                        const std::vector<AccumulateTerms>& groups);

// As cpu::sgd_update. Gradients are multiplied by 1 / *grad_scale where that is not null; where found_inf is not null
// and not zero on the device, parameters are only restored.
void sgd_update(const Target& target, const std::vector<Tensor>& tensors, const std::vector<SgdTerms>& groups,
                const float* grad_scale, const float* found_inf);

// As cpu::adam_update, with the step read on the device where the groups do not hold its corrections.
void adam_update(const Target& target, const std::vector<Tensor>& tensors, const std::vector<AdamTerms>& groups,
                 const float* grad_scale, const float* found_inf);

}  // namespace fused_sam::cuda
