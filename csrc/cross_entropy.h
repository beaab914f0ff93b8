// Cross-entropy of logits: the arguments that the binding passes to the kernels, as raw pointers.
// Formulas: internlm2_kernels/ops/cross_entropy.py.
#pragma once
#include "types.h"

namespace internlm2 {

struct CrossEntropy {
  Dtype dtype;  // of logits and dlogits; sums are held in the accumulator's dtype, double for f64 and float otherwise
  const void* logits;
  int64_t stride, cols;  // stride: between rows of logits; cols: the size of the vocabulary
  const int64_t* label;  // [rows], -1: ignored
  double label_smoothing, z_loss, softcap;
  // In the accumulator's dtype. lse [rows, 2]: the largest logit, and log(sum of exp(l - largest)). They stay separate, because
  // the rounding error of their sum would become a relative error of exp(l - lse). label_logit [rows]: the label's logit.
  // total [rows]: the sum of the row's logits; null: not needed.
  void *lse, *label_logit, *total;
  const double* factor;             // [rows] weight * upstream gradient / divisor of the loss: what multiplies a row's gradient
  void* dlogits;                    // may be the memory of logits; null in a forward that writes no gradient
  int64_t dlogits_stride;
};

// out[i] = in[i] * factor. `from` is the dtype of `in`, `to` that of `out`; `from` is either `to` or its accumulator's dtype.
struct ScaleGradient {
  Dtype from, to;
  const void* in;
  void* out;
  double factor;
};

INTERNLM2_CPU_KERNELS(
  void cross_entropy_fwd(const CrossEntropy& a, int64_t begin, int64_t end);
  void cross_entropy_bwd(const CrossEntropy& a, int64_t begin, int64_t end);
  void scale_gradient(const ScaleGradient& a, int64_t begin, int64_t end);)

}  // namespace internlm2
