#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fused_sam::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  BlockKernels kernels;
};

// Best first.
const Isa kIsas[] = {
#if defined(FUSED_SAM_X86)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     {avx512::sum_of_squares, avx512::perturb, avx512::restore, avx512::accumulate, avx512::sgd_update,
      avx512::adam_update, avx512::stream_copy}},
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     {avx2::sum_of_squares, avx2::perturb, avx2::restore, avx2::accumulate, avx2::sgd_update, avx2::adam_update,
      avx2::stream_copy}},
#endif
    {"portable",
     [] { return true; },
     {portable::sum_of_squares, portable::perturb, portable::restore, portable::accumulate, portable::sgd_update,
      portable::adam_update, portable::stream_copy}},
};

const Isa& choose() {
  const char* asked = std::getenv("FUSED_SAM_CPU_ISA");
  std::string usable;
  for (const Isa& isa : kIsas) {
    if (!isa.supported()) continue;
    if (asked == nullptr || *asked == '\0' || std::strcmp(asked, isa.name) == 0) return isa;
    usable += usable.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::invalid_argument("Invalid FUSED_SAM_CPU_ISA='" + std::string(asked) + "'. Must be one of: " + usable +
                              " (what this build and this machine have).");
}

const Isa& chosen() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace

const BlockKernels& block_kernels() {
  return chosen().kernels;
}

const char* isa_name() {
  return chosen().name;
}

}  // namespace fused_sam::cpu
