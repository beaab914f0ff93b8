// Losses on rewards: the raw-pointer contract between binding and kernels. Formulas: internlm2_kernels/ops/.
#pragma once
#include "types.h"

namespace internlm2 {

struct FocalRanking {
  Dtype acc;  // f32 or f64: the type of dloss, loss and of what is computed
  In chosen, rejected;
  const void* dloss;  // [n], for the backward pass
  void* loss;         // [n]
  Out dchosen, drejected;
  double gamma;
};

struct LogBarrier {
  Dtype acc;
  In rewards;
  const void* dpenalty;  // [n]
  void* penalty;         // [n]
  Out drewards;
  double bound, margin;
  bool clamp;
};

// n sequences, chosen and rejected in turn; their last tokens are rows cu_seqlens[i + 1] - 1 of hidden, or row i where
// cu_seqlens is null.
struct RewardLoss {
  Dtype dtype, weight_dtype;  // weight: dtype or f32
  const void *hidden, *weight;
  const int32_t* cu_seqlens;
  int64_t tokens, n, cols, row_stride;
  double gamma, penalty_weight, bound, margin;
  void *loss, *rewards, *slopes;  // acc, [], [n], [n]; the backward pass reads slopes
  const void *dloss, *drewards;   // acc, [] and [n]; either may be null
  void* drewards_total;           // acc [n]: dloss * slopes + drewards
  void *dhidden, *dweight;        // [tokens, cols], [cols]
};

#define INTERNLM2_REWARD_CPU                                                                       \
  void focal_ranking_loss_fwd(const FocalRanking& a, int64_t begin, int64_t end); /* elements */   \
  void focal_ranking_loss_bwd(const FocalRanking& a, int64_t begin, int64_t end);                  \
  void log_barrier_penalty_fwd(const LogBarrier& a, int64_t begin, int64_t end);                   \
  void log_barrier_penalty_bwd(const LogBarrier& a, int64_t begin, int64_t end);                   \
  void reward_loss_rewards(const RewardLoss& a, int64_t begin, int64_t end); /* sequences */       \
  void reward_loss_total(const RewardLoss& a);                                                     \
  void reward_loss_drewards(const RewardLoss& a);                                                  \
  void reward_loss_dhidden(const RewardLoss& a, int64_t begin, int64_t end); /* tokens */          \
  void reward_loss_dweight(const RewardLoss& a, int64_t begin, int64_t end); /* columns */

namespace cpu {
namespace AVX2 { INTERNLM2_REWARD_CPU }
namespace AVX512 { INTERNLM2_REWARD_CPU }
}  // namespace cpu

}  // namespace internlm2
