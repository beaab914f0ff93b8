// Cross-entropy of logits: the raw-pointer contract between binding and kernels.
// Formulas: internlm2_kernels/ops/cross_entropy.py.
#pragma once
#include "types.h"

namespace internlm2 {

struct CrossEntropy {
  Dtype dtype;  // of logits and their gradient; the accumulator's is float, double for f64
  const void* logits;
  int64_t stride, cols;  // between rows; the vocabulary
  const int64_t* label;  // [rows], -1: ignored
  double label_smoothing, z_loss, softcap;
  // In the accumulator's dtype: lse [rows, 2], the largest logit and the log of the sum of exp(l - largest), because the rounding
  // of their sum would be a relative error of exp(l - lse); the label's logit [rows]; the sum of the logits [rows], may be null.
  void *lse, *label_logit, *total;
  const double* factor;             // [rows] the factor of the row's gradient
  void* dlogits;                    // may be logits; in the forward null, or the gradient is written too
  int64_t dlogits_stride;
};

// out[i] = in[i] * factor. The dtype of `in` is that of `out` or its accumulator's.
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
