// Preloaded by test_allocation_faults.py: makes one allocation fail, by the native core or of a tensor.
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <new>

namespace {

constexpr size_t kTensorBytes = 2048;  // and above: what torch allocates for the data of tensors
// And above: what the core allocates for lists of tensors. pybind11 needs a few dozen bytes for a call, where it has no
// way to report that there are none.
constexpr size_t kListBytes = 512;

// The allocation to fail, counted from 0; negative: none. `asked` counts them.
long failing = -1, asked = 0;

bool fails() {
  return asked++ == failing;
}

// The code of the native core.
uintptr_t first = 0, last = 0;

int find_core(dl_phdr_info* info, size_t, void*) {
  if (strstr(info->dlpi_name, "fused_sam/_native") == nullptr) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD || (segment.p_flags & PF_X) == 0) continue;
    first = info->dlpi_addr + segment.p_vaddr;
    last = first + segment.p_memsz;
  }
  return 1;
}

bool is_ours(const void* caller) {
  const auto address = reinterpret_cast<uintptr_t>(caller);
  return first <= address && address < last;
}

}  // namespace

extern "C" {

void fused_sam_test_fail(long n) {
  if (first == 0) dl_iterate_phdr(find_core, nullptr);
  failing = n;
  asked = 0;
}

long fused_sam_test_asked() {
  return asked;
}

int posix_memalign(void** memory, size_t alignment, size_t size) {
  static const auto real = reinterpret_cast<decltype(&posix_memalign)>(dlsym(RTLD_NEXT, "posix_memalign"));
  if (size >= kTensorBytes && fails()) return ENOMEM;
  return real(memory, alignment, size);
}

}  // extern "C"

void* operator new(size_t size) {
  if (size >= kListBytes && is_ours(__builtin_return_address(0)) && fails()) throw std::bad_alloc();
  if (void* memory = malloc(size)) return memory;
  throw std::bad_alloc();
}

void* operator new(size_t size, std::align_val_t alignment) {
  if (size >= kListBytes && is_ours(__builtin_return_address(0)) && fails()) throw std::bad_alloc();
  const auto multiple = static_cast<size_t>(alignment);
  if (void* memory = aligned_alloc(multiple, (size + multiple - 1) / multiple * multiple)) return memory;
  throw std::bad_alloc();
}
