#include "parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <atomic>
#include <cstring>
#include <string>

namespace fused_sam::cpu {
namespace {

// The entry gcc compiles `#pragma omp parallel` to. libgomp defines it, and LLVM's and Intel's runtimes export it.
using ParallelEntry = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};

// Only the path is taken here: opening a library while the loader's list is held could wait for another thread's
// dlopen.
int find_torch(dl_phdr_info* info, size_t, void* path) {
  if (info->dlpi_name == nullptr || std::strstr(info->dlpi_name, "libtorch_cpu.so") == nullptr) return 0;
  *static_cast<std::string*>(path) = info->dlpi_name;
  return 1;
}

// A look-up through torch's handle searches torch's own dependencies, which tells its runtime from other copies (each
// wheel may vendor one under a name of its own).
ParallelEntry find_entry() {
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  std::string path;
  dl_iterate_phdr(find_torch, &path);
  void* torch = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return torch ? reinterpret_cast<ParallelEntry>(dlsym(torch, "GOMP_parallel")) : nullptr;
}

}  // namespace

void run_team(int threads, void (*body)(void*), void* context) {
  static const ParallelEntry entry = find_entry();
  if (threads <= 1 || entry == nullptr || forked.load(std::memory_order_relaxed)) {
    body(context);
  } else {
    entry(body, context, static_cast<unsigned>(threads), 0);
  }
}

}  // namespace fused_sam::cpu
