// Estimators of the KL divergence per token: the arguments that the binding passes to the kernels, as raw pointers.
// Formulas: internlm2_kernels/ops/kl_penalty.py.
#pragma once
#include "types.h"

namespace internlm2 {

struct KlPenalty {
  Dtype acc;  // f32 or f64: the type of kl and dkl, in which everything is computed
  In logprobs, ref_logprobs;
  const uint8_t* mask;  // [n], may be null: masked entries have kl 0 and gradient 0
  int64_t estimator;  // 1, 2 or 3: the estimator k1, k2 or k3
  void* kl;
  const void* dkl;
  Out dlogprobs, dref;  // dref.data null: the gradient of ref_logprobs is not needed
};

INTERNLM2_CPU_KERNELS(
  void kl_penalty_fwd(const KlPenalty& a, int64_t begin, int64_t end);
  void kl_penalty_bwd(const KlPenalty& a, int64_t begin, int64_t end);)

}  // namespace internlm2
