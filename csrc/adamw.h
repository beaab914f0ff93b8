// AdamW over a list of tensors: the raw-pointer contract between binding and kernel. Formulas: internlm2_kernels/ops/adamw.py.
#pragma once
#include "types.h"

namespace internlm2 {

// Tensors have indices below this number. Index and random stream (one of four) share one word of the random counter.
constexpr int64_t kIndices = int64_t{1} << 30;

// One tensor of the list. Dense, so that elements are counted as they lie in memory.
struct AdamwTensor {
  Dtype dtype, grad_dtype, moment_dtype;  // grad: dtype or f32; moments: f32 or bf16, f64 with an f64 parameter
  void* param;
  const void* grad;
  void* master;  // float, or double with an f64 parameter; null: there is no master copy
  void *exp_avg, *exp_avg_sq;
  int64_t numel, offset;  // offset: where this shard begins in the whole tensor
  double decay, step_size, root_scale;  // 1 - lr weight_decay, lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step)
  uint32_t index, step;                 // with the seed and offset + element, the counter of the random bits
};

struct Adamw {
  double beta1, beta2, eps;
  double grad_factor;  // factor of every gradient: loss scale, clipping, sign
  bool stochastic_rounding;
  uint32_t seed_low, seed_high;
};

INTERNLM2_CPU_KERNELS(void adamw_step(const Adamw& a, const AdamwTensor& t, int64_t begin, int64_t end);)

}  // namespace internlm2
