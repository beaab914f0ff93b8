// Estimators of the KL divergence per token: the raw-pointer contract between binding and kernels.
// Formulas: internlm2_kernels/ops/kl_penalty.py.
#pragma once
#include "types.h"

namespace internlm2 {

struct KlPenalty {
  Dtype acc;
  In logprobs, ref_logprobs;
  const uint8_t* mask;  // [n], may be null: masked entries have kl 0 and gradient 0
  int64_t estimator;  // 1, 2, 3
  void* kl;
  const void* dkl;
  Out dlogprobs, dref;  // dref.data may be null
};

INTERNLM2_CPU_KERNELS(
  void kl_penalty_fwd(const KlPenalty& a, int64_t begin, int64_t end);
  void kl_penalty_bwd(const KlPenalty& a, int64_t begin, int64_t end);)

}  // namespace internlm2
