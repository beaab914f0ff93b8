// PPO's losses: the raw-pointer contract between binding and kernels. Formulas: internlm2_kernels/ops/.
#pragma once
#include "types.h"

namespace internlm2 {

constexpr int64_t kPpoChunk = 4096;  // elements whose sums are one row of `partial`: what is added to what is fixed by n
constexpr int kPolicySums = 4;       // loss, clipped terms, approximate KL, count
constexpr int kValueSums = 9;        // see cpu/ppo.cpp

// What the two losses call them: x logprobs | values, old old_logprobs | old_values, target advantages | returns,
// statistic approx_kl | explained_variance.
struct PpoLoss {
  Dtype acc;  // f32 or f64: the type of dloss, count and of every 0-dim result
  In x, old, target;
  const uint8_t* mask;
  int64_t n;
  double clip;      // value loss: negative for none
  double* partial;  // [chunks, kPolicySums | kValueSums]
  void *loss, *clip_fraction, *statistic, *count;  // the backward pass reads count
  const void* dloss;
  Out dx;
};

struct KlPenalty {
  Dtype acc;
  In logprobs, ref_logprobs;
  int64_t estimator;  // 1, 2, 3
  void* kl;
  const void* dkl;
  Out dlogprobs, dref;  // dref.data may be null
};

#define INTERNLM2_PPO_CPU                                                                \
  void ppo_policy_loss_fwd(const PpoLoss& a, int64_t begin, int64_t end); /* chunks */   \
  void ppo_policy_loss_total(const PpoLoss& a);                                          \
  void ppo_policy_loss_bwd(const PpoLoss& a, int64_t begin, int64_t end); /* elements */ \
  void ppo_value_loss_fwd(const PpoLoss& a, int64_t begin, int64_t end);                 \
  void ppo_value_loss_total(const PpoLoss& a);                                           \
  void ppo_value_loss_bwd(const PpoLoss& a, int64_t begin, int64_t end);                 \
  void kl_penalty_fwd(const KlPenalty& a, int64_t begin, int64_t end);                   \
  void kl_penalty_bwd(const KlPenalty& a, int64_t begin, int64_t end);

namespace cpu {
namespace AVX2 { INTERNLM2_PPO_CPU }
namespace AVX512 { INTERNLM2_PPO_CPU }
}  // namespace cpu

}  // namespace internlm2
