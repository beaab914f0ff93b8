// Reward loss from hidden states, for reward_loss and reward_loss_from_last: the raw-pointer contract between bindings and
// kernels. Formulas: internlm2_kernels/ops/reward_loss.py.
#pragma once
#include "types.h"

namespace internlm2 {

// n sequences, chosen and rejected in turn. The last token of sequence i is row cu_seqlens[i + 1] - 1 of hidden, or row i
// where cu_seqlens is null.
struct RewardLoss {
  Dtype dtype, weight_dtype;  // weight: dtype or f32
  const void *hidden, *weight;
  const int32_t* cu_seqlens;
  int64_t tokens, n, cols, row_stride;
  double gamma, penalty_weight, bound, margin;
  void *loss, *rewards, *slopes;  // accumulator, [], [n], [n]; the backward pass reads slopes
  const void *dloss, *drewards;   // accumulator, [] and [n]; either may be null
  void* drewards_total;           // accumulator, [n]: dloss * slopes + drewards
  void *dhidden, *dweight;        // [tokens, cols], [cols]
};

INTERNLM2_CPU_KERNELS(
  void reward_loss_rewards(const RewardLoss& a, int64_t first_sequence, int64_t last_sequence);
  void reward_loss_total(const RewardLoss& a);
  void reward_loss_drewards(const RewardLoss& a);
  void reward_loss_dhidden(const RewardLoss& a, int64_t first_token, int64_t last_token);
  void reward_loss_dweight(const RewardLoss& a, int64_t first_column, int64_t last_column);)

}  // namespace internlm2
