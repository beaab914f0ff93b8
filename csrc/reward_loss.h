// Reward loss from hidden states, for reward_loss and reward_loss_from_last: the arguments that the binding passes to the
// kernels, as raw pointers. Formulas: internlm2_kernels/ops/reward_loss.py.
#pragma once
#include "types.h"

namespace internlm2 {

// n sequences: those of even index are chosen, each followed by the rejected one of its pair. The last token of sequence i is
// row cu_seqlens[i + 1] - 1 of hidden, or row i where cu_seqlens is null.
struct RewardLoss {
  Dtype dtype, weight_dtype;  // weight: dtype or f32
  const void *hidden, *weight;
  const int32_t* cu_seqlens;
  int64_t tokens, n, cols, row_stride;
  double gamma, penalty_weight, bound, margin;
  // In the accumulator's dtype. loss is 0-dim; rewards [n]; slopes [n]: the derivative of the loss with respect to each reward,
  // which the backward reads. dloss, 0-dim, and drewards [n] are upstream gradients, and either may be null.
  void *loss, *rewards, *slopes;
  const void *dloss, *drewards;
  void* drewards_total;           // [n]: dloss * slopes + drewards
  void* dhidden;                  // [tokens, cols]
  void* dweight;                  // [cols]
};

INTERNLM2_CPU_KERNELS(
  void reward_loss_rewards(const RewardLoss& a, int64_t first_sequence, int64_t last_sequence);
  void reward_loss_total(const RewardLoss& a);
  void reward_loss_drewards(const RewardLoss& a);
  void reward_loss_dhidden(const RewardLoss& a, int64_t first_token, int64_t last_token);
  void reward_loss_dweight(const RewardLoss& a, int64_t first_column, int64_t last_column);)

}  // namespace internlm2
