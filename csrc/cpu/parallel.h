// One parallel region on the threads torch already has.
#pragma once

#include <cstdint>

namespace fused_sam::cpu {

// Calls body(context) on every thread of a team of `threads`, and returns when all have. The team is that of the OpenMP
// runtime torch itself runs on, found in the process at the first call, so no second pool spins beside torch's.
// Runs on the caller alone when there is no such runtime, and in a child forked after the first call, where the
// runtime's threads are gone and waiting for them would never end.
void run_team(int threads, void (*body)(void*), void* context);

}  // namespace fused_sam::cpu
