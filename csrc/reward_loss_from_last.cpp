// Bindings of reward_loss_from_last. Its kernels are those of reward_loss (cpu/reward_loss.cpp), called without cu_seqlens.
#include "reward_loss_call.h"

namespace internlm2 {
namespace {

RewardLoss args_of(const Tensor& last_hidden, const Tensor& weight) {
  check_cpu();
  return reward_args("reward_loss_from_last", "last_hidden", last_hidden, weight, last_hidden.size(0), nullptr);
}

RewardForward reward_loss_from_last_fwd_cpp(const Tensor& last_hidden, const Tensor& weight, double gamma,
                                            double penalty_weight, double bound, double margin) {
  return reward_forward(args_of(last_hidden, weight), last_hidden, gamma, penalty_weight, bound, margin);
}

RewardBackward reward_loss_from_last_bwd_cpp(const OptTensor& dloss, const OptTensor& drewards, const Tensor& last_hidden,
                                             const Tensor& weight, const Tensor& slopes, bool needs_dhidden,
                                             bool needs_dweight) {
  return reward_backward(args_of(last_hidden, weight), dloss, drewards, last_hidden, weight, slopes, needs_dhidden,
                         needs_dweight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "reward_loss_from_last_fwd.cpp", reward_loss_from_last_fwd_cpp);
  INTERNLM2_IMPL(m, "reward_loss_from_last_bwd.cpp", reward_loss_from_last_bwd_cpp);
}

}  // namespace internlm2
