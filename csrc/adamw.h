// AdamW over a list of tensors, and the norm of their gradients: the raw-pointer contract between binding and kernels.
// Formulas: internlm2_kernels/ops/.
#pragma once
#include "types.h"

namespace internlm2 {

constexpr int64_t kIndices = int64_t{1} << 30;  // of tensors: with a stream of four, a word of the random numbers' counter
constexpr int64_t kListChunk = 65536;  // elements of one tensor that are worked on at a time, and whose squares are one sum

// One tensor of the list. Dense, so that elements are counted as they lie in memory.
struct AdamwTensor {
  Dtype dtype, grad_dtype, moment_dtype;  // grad: dtype or f32; moments: f32 or bf16, f64 with an f64 parameter
  void* param;
  const void* grad;
  void* master;  // float, or double with an f64 parameter; null: the parameter is its own
  void *exp_avg, *exp_avg_sq;
  int64_t numel, offset;  // offset: of the first element in the tensor that this one is a part of
  double decay, step_size, root_scale;  // 1 - lr weight_decay, lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step)
  uint32_t index, step;                 // what random bits are made of, besides the seed and offset + element
};

struct Adamw {
  double beta1, beta2, eps;
  double grad_factor;  // what gradients are multiplied with: loss scale, clipping, sign
  bool stochastic_rounding;
  uint32_t seed_low, seed_high;
};

#define INTERNLM2_ADAMW_CPU                                                                                      \
  double sum_of_squares(const In& grad, int64_t begin, int64_t end);                                             \
  void adamw_step(const Adamw& a, const AdamwTensor& t, int64_t begin, int64_t end);

namespace cpu {
namespace AVX2 { INTERNLM2_ADAMW_CPU }
namespace AVX512 { INTERNLM2_ADAMW_CPU }
}  // namespace cpu

}  // namespace internlm2
