// The CPU entry points: cut the tensor list into blocks, let threads claim them, call the block kernels.
#include <unistd.h>
#if defined(FUSED_SAM_X86)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <utility>
#include <vector>

#include "../kernels.h"
#include "block_kernels.h"
#include "isa.h"
#include "parallel.h"
#include "powers.h"

namespace fused_sam::cpu {
namespace {

// Below this many elements waking a second thread costs more than it saves.
constexpr int64_t kSerialElements = 32768;

// Blocks [first[i], first[i + 1]) belong to tensor i.
class Partition {
 public:
  template <class Takes>
  Partition(const Tensor* tensors, size_t count, Takes takes) : tensors_(tensors), first_(count + 1, 0) {
    for (size_t i = 0; i < count; ++i) {
      const int64_t numel = takes(tensors[i]) ? tensors[i].numel : 0;
      first_[i + 1] = first_[i] + (numel + kBlock - 1) / kBlock;
      elements_ += numel;
      bytes_ += numel * size_of(tensors[i].dtype);
    }
  }

  int64_t blocks() const { return first_.back(); }
  int64_t elements() const { return elements_; }
  int64_t bytes() const { return bytes_; }

  // Calls visit(tensor, begin, count, block) for block number `block`. *last is the tensor of the one before, or 0.
  template <class Visit>
  void visit(int64_t block, size_t* last, const Visit& visit_block) const {
    const size_t i = *last = tensor_of(block, *last);
    const int64_t begin = (block - first_[i]) * kBlock;
    visit_block(tensors_[i], begin, std::min(kBlock, tensors_[i].numel - begin), block);
  }

 private:
  size_t tensor_of(int64_t block, size_t last) const {
    if (block < first_[last]) {
      return static_cast<size_t>(std::upper_bound(first_.begin(), first_.end(), block) - first_.begin()) - 1;
    }
    while (block >= first_[last + 1]) ++last;
    return last;
  }

  const Tensor* tensors_;
  std::vector<int64_t> first_;
  int64_t elements_ = 0, bytes_ = 0;
};

// Non-temporal stores are ordered by nothing but this: once per thread, since it waits for all of them.
void finish_streaming() {
#if defined(FUSED_SAM_X86)
  _mm_sfence();
#endif
}

enum class Order { ascending, descending };

// Descending goes from run to run, but upwards within a run: the hardware prefetcher follows only long upward streams.
constexpr int64_t kRun = 16;

int64_t nth_block(int64_t n, int64_t blocks, Order order) {
  if (order == Order::ascending) return n;
  const int64_t end = blocks - n / kRun * kRun;
  return std::max<int64_t>(end - kRun, 0) + n % kRun;
}

// Blocks are claimed one by one: a static split waits for whichever thread was preempted.
template <class Visit>
void for_each_block(const Partition& partition, int threads, Order order, const Visit& visit) {
  struct Team {
    const Partition& partition;
    const Visit& visit;
    Order order;
    std::atomic<int64_t> next{0};

    static void body(void* context) {
      Team& team = *static_cast<Team*>(context);
      const int64_t blocks = team.partition.blocks();
      size_t tensor = 0;
      for (int64_t b; (b = team.next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
        team.partition.visit(nth_block(b, blocks, team.order), &tensor, team.visit);
      }
      finish_streaming();
    }
  } team{partition, visit, order};
  const int64_t useful = partition.elements() < kSerialElements ? 1 : std::min<int64_t>(threads, partition.blocks());
  run_team(static_cast<int>(useful), &Team::body, &team);
}

// The last-level cache that one core can use. sysconf counts all of a socket's, which on machines with several is no
// core's to use; the kernel's own account of the first core comes first.
int64_t last_level_cache() {
  long kibibytes = 0;
  if (FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%ldK", &kibibytes) != 1) kibibytes = 0;
    std::fclose(file);
  }
  if (kibibytes > 0) return int64_t{kibibytes} << 10;
  const long total = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return total > 0 ? total : int64_t{32} << 20;
}

// Write-only data bypasses the cache only if the cache could not have kept it for the next pass over the weights.
bool exceeds_cache(int64_t bytes) {
  static const int64_t cache = last_level_cache();
  return bytes > cache;
}

bool has_grad(const Tensor& t) {
  return t.grad != nullptr;
}

}  // namespace

namespace {

Norm two_norm(const Partition& partition, const AscentGroup* groups, int threads) {
  std::vector<double> partials(static_cast<size_t>(partition.blocks()));
  const auto kernel = block_kernels().sum_of_squares;
  for_each_block(partition, threads, Order::ascending, [&](const Tensor& t, int64_t begin, int64_t n, int64_t block) {
    partials[static_cast<size_t>(block)] = kernel(t, begin, n, groups[t.group]);
  });
  return {std::sqrt(std::accumulate(partials.begin(), partials.end(), 0.0)), -1.0, -1.0};
}

Norm largest(const Partition& partition, const Tensor* tensors, const AscentGroup* groups, int threads) {
  std::vector<std::pair<Peak, const Tensor*>> partials(static_cast<size_t>(partition.blocks()));
  for_each_block(partition, threads, Order::ascending, [&](const Tensor& t, int64_t begin, int64_t n, int64_t block) {
    partials[static_cast<size_t>(block)] = {peak(t, begin, n, groups[t.group]), &t};
  });
  std::pair<Peak, const Tensor*> highest{Peak{}, tensors};
  for (const auto& partial : partials) {
    if (highest.first.is_below(partial.first.value)) highest = partial;
  }
  return {highest.first.value, static_cast<double>(highest.second - tensors),
          static_cast<double>(highest.first.element)};
}

}  // namespace

Norm norm(const Tensor* tensors, size_t count, const AscentGroup* groups, double q, int threads) {
  const Partition partition(tensors, count, has_grad);
  const bool square = q == 2.0;
  const Norm first = square ? two_norm(partition, groups, threads) : largest(partition, tensors, groups, threads);
  const double scale = square ? far_scale(first.value) : first.value;
  if (std::isinf(q) || !(scale > 0.0) || std::isinf(scale) || (square && !holds_f64(tensors, count))) return first;
  std::vector<double> partials(static_cast<size_t>(partition.blocks()));
  for_each_block(partition, threads, Order::ascending, [&](const Tensor& t, int64_t begin, int64_t n, int64_t block) {
    partials[static_cast<size_t>(block)] = sum_of_powers(t, begin, n, groups[t.group], q, scale);
  });
  const double sum = std::accumulate(partials.begin(), partials.end(), 0.0);
  if (std::isnan(sum)) return first;  // an infinite gradient, of which Kahan's sum makes that
  return {scale * std::pow(sum, 1.0 / q), -1.0, -1.0};
}

void perturb(const Tensor* tensors, size_t count, const AscentGroup* groups, double q, const Norm& norm, int threads) {
  const Partition partition(tensors, count, has_grad);
  const bool stream = exceeds_cache(partition.bytes());
  const bool power = q != 1.0 && q != 2.0;
  const auto kernel = block_kernels().perturb;
  std::vector<AscentScalars> scalars[2];  // per group; fp64 tensors have their own
  for (size_t i = 0; i < count; ++i) {
    const auto group = static_cast<size_t>(tensors[i].group);
    for (size_t k = scalars[0].size(); k <= group; ++k) {
      scalars[0].push_back(ascent_scalars(groups[k].rho, groups[k], q, norm.value, false));
      scalars[1].push_back(ascent_scalars(groups[k].rho, groups[k], q, norm.value, true));
    }
  }
  // Descending: the cache still holds the gradients that the norm read last.
  for_each_block(partition, threads, Order::descending, [&](const Tensor& t, int64_t begin, int64_t n, int64_t) {
    const AscentScalars& s = scalars[t.dtype == DType::f64][static_cast<size_t>(t.group)];
    if (power && s.active) {
      const bool here = static_cast<double>(&t - tensors) == norm.tensor;
      power_perturb(t, begin, n, groups[t.group], q, norm.value, here ? static_cast<int64_t>(norm.element) : -1);
    } else {
      kernel(t, begin, n, s, stream);
    }
  });
}

void restore(const Tensor* tensors, size_t count, int threads) {
  const Partition partition(tensors, count, [](const Tensor& t) { return t.backup != nullptr; });
  const bool stream = exceeds_cache(partition.bytes());
  const auto kernel = block_kernels().restore;
  for_each_block(partition, threads, Order::ascending,
                 [&](const Tensor& t, int64_t begin, int64_t n, int64_t) { kernel(t, begin, n, stream); });
}

// What a base step does to tensors without a gradient.
static void restore_ungraded(const Tensor* tensors, size_t count, int threads) {
  std::vector<Tensor> restored;
  for (size_t i = 0; i < count; ++i) {
    if (!has_grad(tensors[i]) && tensors[i].backup != nullptr) restored.push_back(tensors[i]);
  }
  if (!restored.empty()) restore(restored.data(), restored.size(), threads);
}

void restore_accumulate(const Tensor* tensors, size_t count, const AccumulateGroup* groups, int threads) {
  const Partition partition(tensors, count, [](const Tensor& t) { return has_grad(t) || t.backup != nullptr; });
  const bool stream = exceeds_cache(partition.bytes());
  const auto restore_block = block_kernels().restore;
  const auto accumulate_block = block_kernels().accumulate;
  for_each_block(partition, threads, Order::ascending, [&](const Tensor& t, int64_t begin, int64_t n, int64_t) {
    if (has_grad(t)) {
      accumulate_block(t, begin, n, groups[t.group], stream);
    } else {
      restore_block(t, begin, n, stream);
    }
  });
}

void sgd_update(const Tensor* tensors, size_t count, const SgdGroup* groups, double grad_multiplier, int threads) {
  restore_ungraded(tensors, count, threads);
  const Partition partition(tensors, count, has_grad);
  const bool stream = exceeds_cache(partition.bytes());
  const auto kernel = block_kernels().sgd_update;
  for_each_block(partition, threads, Order::ascending, [&](const Tensor& t, int64_t begin, int64_t n, int64_t) {
    kernel(t, begin, n, SgdScalars{groups[t.group], grad_multiplier}, stream);
  });
}

void adam_update(const Tensor* tensors, size_t count, const AdamGroup* groups, double grad_multiplier, int threads) {
  restore_ungraded(tensors, count, threads);
  const Partition partition(tensors, count, has_grad);
  const bool stream = exceeds_cache(partition.bytes());
  const auto kernel = block_kernels().adam_update;
  for_each_block(partition, threads, Order::ascending, [&](const Tensor& t, int64_t begin, int64_t n, int64_t) {
    const AdamGroup& group = groups[t.group];
    kernel(t, begin, n, AdamTerms{adam_scalars(group, group.lr, t.step), grad_multiplier}, stream);
  });
}

void stream_copy(void* dst, const void* src, int64_t bytes, int threads) {
  Tensor whole{};
  whole.param = dst;
  whole.grad = const_cast<void*>(src);
  whole.numel = (bytes + 1) / 2;
  whole.dtype = whole.grad_dtype = DType::bf16;
  const Partition partition(&whole, 1, has_grad);
  const auto kernel = block_kernels().stream_copy;
  for_each_block(partition, threads, Order::ascending, [&](const Tensor&, int64_t begin, int64_t n, int64_t) {
    const int64_t offset = begin * 2, size = std::min(n * 2, bytes - offset);
    kernel(static_cast<char*>(dst) + offset, static_cast<const char*>(src) + offset, size);
  });
}

}  // namespace fused_sam::cpu
