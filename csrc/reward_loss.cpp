#include "reward_loss_call.h"

namespace internlm2 {
namespace {

RewardLoss args_of(const Tensor& hidden, const Tensor& weight, const Tensor& cu_seqlens) {
  check_cpu();
  check_cu_seqlens("reward_loss", "cu_seqlens", cu_seqlens, hidden.size(0), 1);
  return reward_args("reward_loss", "cu_seqlens", hidden, weight, cu_seqlens.numel() - 1,
                     static_cast<const int32_t*>(cdata(cu_seqlens)));
}

RewardForward reward_loss_fwd_cpp(const Tensor& hidden, const Tensor& weight, const Tensor& cu_seqlens, double gamma,
                                  double penalty_weight, double bound, double margin) {
  return reward_forward(args_of(hidden, weight, cu_seqlens), hidden, gamma, penalty_weight, bound, margin);
}

RewardBackward reward_loss_bwd_cpp(const OptTensor& dloss, const OptTensor& drewards, const Tensor& hidden,
                                   const Tensor& weight, const Tensor& cu_seqlens, const Tensor& slopes, bool needs_dhidden,
                                   bool needs_dweight) {
  return reward_backward(args_of(hidden, weight, cu_seqlens), dloss, drewards, hidden, weight, slopes, needs_dhidden,
                         needs_dweight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "reward_loss_fwd.cpp", reward_loss_fwd_cpp);
  INTERNLM2_IMPL(m, "reward_loss_bwd.cpp", reward_loss_bwd_cpp);
}

}  // namespace internlm2
