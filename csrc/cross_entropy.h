// Cross-entropy of given logits: the raw-pointer contract between binding and kernels. Formulas:
// internlm2_kernels/ops/cross_entropy.py.
#pragma once
#include "types.h"

namespace internlm2 {

struct CrossEntropy {
  Dtype dtype;  // of logits and their gradient; the accumulator's is float, double for f64
  const void* logits;
  int64_t stride, cols;  // between rows; the vocabulary
  const int64_t* label;  // [rows], -1: ignored
  double label_smoothing, z_loss, softcap;
  // In the accumulator's dtype. lse [rows, 2]: rounded, and what rounding cut off it, by which exp(l - lse) would be off
  // relatively; [rows]: the label's logit; the sum of the logits, may be null.
  void *lse, *label_logit, *total;
  const double* factor;             // [rows] what the row's gradient is multiplied with
  void* dlogits;                    // may be logits; forward: null, or the gradient is written too
  int64_t dlogits_stride;
};

// out[i] = in[i] * factor, rounded to its dtype: the accumulator's of `in`, that of `in`, or a narrower one.
struct ScaleGradient {
  Dtype from, to;
  const void* in;
  void* out;
  double factor;
};

#define INTERNLM2_CROSS_ENTROPY_CPU                                            \
  void cross_entropy_fwd(const CrossEntropy& a, int64_t begin, int64_t end);   \
  void cross_entropy_bwd(const CrossEntropy& a, int64_t begin, int64_t end);   \
  void scale_gradient(const ScaleGradient& a, int64_t begin, int64_t end);

namespace cpu {
namespace AVX2 { INTERNLM2_CROSS_ENTROPY_CPU }
namespace AVX512 { INTERNLM2_CROSS_ENTROPY_CPU }
}  // namespace cpu

}  // namespace internlm2
