// PPO's policy and value losses: the arguments that the binding passes to the kernels, as raw pointers.
// Formulas: internlm2_kernels/ops/ppo_policy_loss.py, ppo_value_loss.py.
#pragma once
#include "types.h"

namespace internlm2 {

constexpr int64_t kPpoChunk = 4096;  // elements of a chunk, whose sums are a row of `partial`; their order depends on n alone
constexpr int kPolicySums = 4;       // sums in a row of `partial`: of losses, clipped terms, approximate KL, and the count
constexpr int kValueSums = 7;        // numbers in a row of `partial`: those of ValueSums in cpu/ppo_value_loss.cpp

// What each field stands for:  policy loss     value loss
//   x                          logprobs        values
//   old                        old_logprobs    old_values
//   target                     advantages      returns
//   statistic                  approx_kl       explained_variance
struct PpoLoss {
  Dtype acc;  // f32 or f64: the type of dloss, count and of every 0-dim result
  In x, old, target;
  const uint8_t* mask;
  int64_t n;
  double clip;      // the clip range; in the value loss a negative one means no clipping
  double* partial;  // [chunks, kPolicySums | kValueSums]
  void *loss, *clip_fraction, *statistic, *count;  // 0-dim results; the backward reads count, the number of unmasked entries
  const void* dloss;
  Out dx;
};

INTERNLM2_CPU_KERNELS(
  void ppo_policy_loss_fwd(const PpoLoss& a, int64_t first_chunk, int64_t last_chunk);
  void ppo_policy_loss_total(const PpoLoss& a);
  void ppo_policy_loss_bwd(const PpoLoss& a, int64_t begin, int64_t end);
  void ppo_value_loss_fwd(const PpoLoss& a, int64_t first_chunk, int64_t last_chunk);
  void ppo_value_loss_total(const PpoLoss& a);
  void ppo_value_loss_bwd(const PpoLoss& a, int64_t begin, int64_t end);)

}  // namespace internlm2
