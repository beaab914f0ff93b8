// Focal ranking loss of pairs of rewards: the arguments that the binding passes to the kernels, as raw pointers.
// Formula: internlm2_kernels/ops/focal_ranking_loss.py.
#pragma once
#include "types.h"

namespace internlm2 {

struct FocalRanking {
  Dtype acc;  // f32 or f64: the type of dloss and loss, in which everything is computed
  In chosen, rejected;
  const void* dloss;  // [n] the upstream gradient, read by the backward
  void* loss;         // [n]
  Out dchosen, drejected;
  double gamma;
};

INTERNLM2_CPU_KERNELS(
  void focal_ranking_loss_fwd(const FocalRanking& a, int64_t begin, int64_t end);
  void focal_ranking_loss_bwd(const FocalRanking& a, int64_t begin, int64_t end);)

}  // namespace internlm2
