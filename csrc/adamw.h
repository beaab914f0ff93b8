// AdamW over a list of tensors: the arguments that the binding passes to the kernels, as raw pointers. Formulas:
// internlm2_kernels/ops/adamw.py.
#pragma once
#include "types.h"

namespace internlm2 {

// The bound of AdamwTensor::index: one 32-bit word of Philox's counter holds 4 * index + the random stream of the tensor (the
// parameter, exp_avg and exp_avg_sq each have their own stream).
constexpr int64_t kIndices = int64_t{1} << 30;

// One parameter tensor with its gradient and moments. All are dense (no gaps between elements) and have the same strides, so
// that element i of each lies at offset i in memory.
struct AdamwTensor {
  Dtype dtype, grad_dtype, moment_dtype;  // grad_dtype: dtype or f32; moment_dtype: f32 or bf16, but f64 where dtype is f64
  void* param;
  const void* grad;
  void* master;  // master weights in float, or in double where dtype is f64; null: there are none
  void *exp_avg, *exp_avg_sq;
  int64_t numel, offset;  // offset: the element of the unsharded tensor at which this shard begins
  // decay = 1 - lr weight_decay, step_size = lr / (1 - beta1^step), root_scale = 1 / sqrt(1 - beta2^step)
  double decay, step_size, root_scale;
  uint32_t index, step;  // of the tensor, and of the update: the random bits follow from both, the seed and the element
};

struct Adamw {
  double beta1, beta2, eps;
  double grad_factor;  // factor of every gradient: loss scale, clipping, sign
  bool stochastic_rounding;
  uint32_t seed_low, seed_high;
};

INTERNLM2_CPU_KERNELS(void adamw_step(const Adamw& a, const AdamwTensor& t, int64_t begin, int64_t end);)

}  // namespace internlm2
