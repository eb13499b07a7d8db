// What csrc/cpu/parallel.cpp calls of an OpenMP runtime, on plain threads: ThreadSanitizer sees them start and end.
#include <atomic>
#include <thread>
#include <vector>

extern "C" {

std::atomic<long> fused_sam_test_teams{0};

void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned) {
  ++fused_sam_test_teams;
  std::vector<std::thread> team;
  for (unsigned i = 1; i < threads; ++i) team.emplace_back(body, context);
  body(context);
  for (std::thread& member : team) member.join();
}

}  // extern "C"
