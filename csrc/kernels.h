// Entry points of the torch-free core: raw pointers, element counts and scalars.
//
// Notation (Foret et al. 2021, Algorithm 1 and eq. 2; Kwon et al. 2021 for the adaptive form):
//   w  parameter        g  gradient at w        g' gradient at w + e
//   x  = T (g + decay * w)  with T = |w| + eta elementwise for adaptive groups, 1 otherwise; decay is 0 where weight
//        decay is no part of the ascent
//   e  = rho * T sign(x) (|x| / ||x||_q)^(q-1)  with 1/p + 1/q = 1, so that ||e / T||_p = rho; one norm over all groups
//        p = 2: rho * T x / ||x||_2;  p = inf: rho * T sign(x);  p = 1: all of rho T at the largest |x|
//
// Callers guarantee: every pointer is valid for `numel` elements of `dtype` (null only where said),
// tensors that are written do not overlap one another, elements of one item correspond by index.
#pragma once

#include "types.h"

namespace fused_sam {

// Tensors of state that a base step may keep for a parameter.
constexpr int kStates = 3;

// One parameter tensor and what belongs to it.
struct Tensor {
  void* param;    // [numel] w, or w + e between the two passes; with a rounded copy the fp32 master, always w
  void* rounded;  // [numel] of rounded_dtype: what the network computes with, w or w + e. Null where that is `param`
  void* grad;     // [numel] gradient; null: the tensor takes no part in norm, perturb, base step
  void* backup;   // [numel] w, kept between the two passes; null: nothing is displaced. With a rounded copy it is param
  void* state[kStates];  // [numel] of the base step; null where it keeps none. SGD: momentum buffer.
                         // Adam: averages of g and of g^2, and with amsgrad the largest of the latter
  const float* step;     // [1] of Adam, the steps before this one where the kernel is to read them; else null
  int64_t numel;
  DType dtype;                       // of param, backup and state
  DType grad_dtype;                  // can_mix(dtype, grad_dtype)
  DType rounded_dtype = DType::f32;  // 16-bit, grad_dtype the same or f32, and dtype f32; f32: there is none
  int32_t group;

  FUSED_SAM_HD bool has_rounded() const { return rounded_dtype != DType::f32; }
};

struct AscentGroup {
  double rho;
  bool adaptive;
  double eta, decay;

  // Whether x depends on w.
  FUSED_SAM_HD bool reads_weights() const { return adaptive || decay != 0.0; }
};

// ||x||_q; for q = inf also where its largest element is: the tensor's number in the list, the element's in the tensor
// (in the order of memory). Of equal elements it is the first.
struct Norm {
  double value, tensor, element;
};

struct SgdGroup {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  bool first;  // the momentum buffers hold nothing yet: they are written, never read
};

struct AdamGroup {
  double lr, beta1, beta2, eps, weight_decay;
  double correction1, correction2_root;  // 1 - beta1^t, sqrt(1 - beta2^t); zero: t is *Tensor::step + 1
  bool decoupled;                        // weight decay as in AdamW, not added to the gradient
  bool amsgrad, maximize;
  bool first;  // the state holds nothing yet: it is written, never read
};

// Of the tensors whose `param` is a running mean of gradients.
struct AccumulateGroup {
  double weight;
  bool first;  // the mean holds nothing yet: it is written, never read, and becomes weight * g
};

// Elements per block. The norm keeps one fp64 partial per block and adds them in index order, so its bits
// depend on neither the thread count nor the instruction set. 64 KB of fp32: small enough to balance the 36 k
// element tensors of a CIFAR ResNet over threads, large enough for the claim of a block to cost nothing.
constexpr int64_t kBlock = 16384;

namespace cpu {

// ||x||_q over all tensors, accumulated in fp64. q > 1, possibly infinite.
Norm norm(const Tensor* tensors, size_t count, const AscentGroup* groups, double q, int threads);

// backup <- w, param <- w + e; with a rounded copy only rounded <- w + e. `backup == grad` swaps in place: the first
// gradient's storage, of the parameter's dtype, then holds w. A norm that is zero or not finite, and rho = 0, mean e =
// 0 exactly (backup is still written). q >= 1; for q = 1 the norm is not used.
void perturb(const Tensor* tensors, size_t count, const AscentGroup* groups, double q, const Norm& norm, int threads);

// param <- backup, where there is a backup; with a rounded copy, rounded <- backup.
void restore(const Tensor* tensors, size_t count, int threads);

// mean <- mean + weight * (g - mean) for every tensor that has a gradient g, with the mean as its `param` and no
// backup; `restore` of all others. Computed as torch's lerp. Where the group says `first`, g may be the mean itself.
void restore_accumulate(const Tensor* tensors, size_t count, const AccumulateGroup* groups, int threads);

// w <- backup (param where there is none), then with g = grad_multiplier * grad:
//   d = (maximize ? -g : g) + weight_decay * w
//   m = first ? d : momentum * m + (1 - dampening) * d
//   param <- w - lr * (nesterov ? d + momentum * m : momentum != 0 ? m : d)
// in the operation order and with the fused multiply-adds of torch.optim.SGD(foreach=False). The scaled gradient is
// written back when grad_multiplier != 1 (a GradScaler's users read unscaled gradients after the step).
// With a rounded copy, rounded <- param in the same pass. Tensors without a gradient are restored only.
void sgd_update(const Tensor* tensors, size_t count, const SgdGroup* groups, double grad_multiplier, int threads);

// w <- backup (param where there is none), then at step t with g = grad_multiplier * (maximize ? -grad : grad):
//   decoupled:  w <- (1 - lr * weight_decay) * w;  else  g <- g + weight_decay * w
//   m <- m + (1 - beta1) * (g - m)
//   v <- beta2 * v + (1 - beta2) * g^2
//   u = amsgrad ? (largest v so far) : v
//   param <- w - lr / (1 - beta1^t) * m / (sqrt(u) / sqrt(1 - beta2^t) + eps)
// in the operation order and with the fused multiply-adds of torch.optim.Adam(foreach=False). Otherwise as sgd_update.
void adam_update(const Tensor* tensors, size_t count, const AdamGroup* groups, double grad_multiplier, int threads);

// dst <- src with non-temporal stores: the memory-speed yardstick of the benchmarks.
void stream_copy(void* dst, const void* src, int64_t bytes, int threads);

// "avx512", "avx2" or "portable"; FUSED_SAM_CPU_ISA overrides, an ISA this machine lacks throws.
const char* isa_name();

}  // namespace cpu
}  // namespace fused_sam
