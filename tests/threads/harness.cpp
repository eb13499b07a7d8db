// The threaded driver of the CPU kernels under ThreadSanitizer: every op on one thread and on several, from two callers
// at once, to the same bits. openmp.cpp stands in for the OpenMP runtime, whose barriers ThreadSanitizer cannot see.
#include <dlfcn.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/kernels.h"

using namespace fused_sam;

namespace {

// Awkward sizes: nothing, one element, around a block, and several blocks, two threads' work each.
const int64_t kSizes[] = {0, 1, 1009, kBlock - 1, kBlock + 1, 5 * kBlock + 77};
constexpr size_t kTensors = sizeof(kSizes) / sizeof(kSizes[0]);

// Tensors of one dtype, in two groups, with contents that depend on nothing but the seed.
template <class T>
class Lists {
 public:
  Lists(DType dtype, unsigned seed) {
    for (size_t i = 0; i < kTensors; ++i) {
      Tensor t{};
      void** columns[] = {&t.param, &t.grad, &t.backup, &t.state[0], &t.state[1]};
      for (void** column : columns) {
        memory_.emplace_back(static_cast<size_t>(kSizes[i]) + 1);
        for (T& x : memory_.back()) {
          seed = seed * 1664525u + 1013904223u;
          x = static_cast<T>(static_cast<int>(seed >> 16) % 2001 - 1000) / static_cast<T>(997);
        }
        *column = memory_.back().data();
      }
      for (T& x : memory_.back()) x = std::abs(x);  // Adam's average of squares
      t.numel = kSizes[i];
      t.dtype = t.grad_dtype = dtype;
      t.group = i < 3 ? 0 : 1;
      tensors.push_back(t);
    }
  }

  bool operator==(const Lists& other) const { return memory_ == other.memory_; }

  std::vector<Tensor> tensors;

 private:
  std::vector<std::vector<T>> memory_;
};

template <class T>
Lists<T> run(DType dtype, unsigned seed, int threads, std::vector<double>* norms) {
  Lists<T> x(dtype, seed);
  const size_t n = x.tensors.size();
  const AscentGroup ascent[] = {{0.07, false, 0.0, 0.0}, {0.21, true, 0.013, 0.017}};
  for (const double q : {2.0, 1.5, HUGE_VAL}) {
    const Norm norm = cpu::norm(x.tensors.data(), n, ascent, q, threads);
    norms->insert(norms->end(), {norm.value, norm.tensor, norm.element});
    cpu::perturb(x.tensors.data(), n, ascent, q, norm, threads);
    cpu::restore(x.tensors.data(), n, threads);
  }
  const SgdGroup sgd[] = {{0.13, 0.87, 0.3, 0.017, false, false, false}, {0.13, 0.87, 0.0, 0.017, true, true, false}};
  cpu::sgd_update(x.tensors.data(), n, sgd, 0.5, threads);
  const AdamGroup adam = {0.013, 0.8, 0.97, 1e-5, 0.17, 0.36, 0.17, true, false, false, false};
  const AdamGroup adams[] = {adam, adam};
  cpu::adam_update(x.tensors.data(), n, adams, 1.0, threads);
  return x;
}

template <class T>
bool same_for_any_team(DType dtype, unsigned seed) {
  std::vector<double> expected_norms;
  const Lists<T> expected = run<T>(dtype, seed, 1, &expected_norms);
  for (const int threads : {2, 3, 8}) {
    std::vector<double> norms;
    if (!(run<T>(dtype, seed, threads, &norms) == expected) || norms != expected_norms) return false;
  }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  // The name by which csrc/cpu/parallel.cpp finds torch, and through it the runtime.
  const std::string self = arguments[0];
  const std::string torch = self.substr(0, self.rfind('/')) + "/libtorch_cpu.so";
  void* runtime = dlopen(torch.c_str(), RTLD_NOW);
  if (runtime == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  bool same[4] = {};
  std::thread other([&] {
    same[0] = same_for_any_team<float>(DType::f32, 3);
    same[1] = same_for_any_team<double>(DType::f64, 5);
  });
  same[2] = same_for_any_team<float>(DType::f32, 7);
  same[3] = same_for_any_team<double>(DType::f64, 9);
  other.join();
  const auto* teams = static_cast<const std::atomic<long>*>(dlsym(runtime, "fused_sam_test_teams"));
  std::printf("%ld teams of several threads\n", teams == nullptr ? 0 : teams->load());
  for (const bool s : same) {
    if (!s) return std::puts("the bits depend on the number of threads"), 1;
  }
  return 0;
}
