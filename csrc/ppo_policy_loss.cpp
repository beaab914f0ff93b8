#include "ppo_loss_call.h"

namespace internlm2 {
namespace {

PpoResults ppo_policy_loss_fwd_cpp(const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages,
                                   const Tensor& mask, double clip) {
  PpoCall call("ppo_policy_loss", logprobs, old_logprobs, advantages, mask, clip);
  return call.forward(kPolicySums, 2, [&](int64_t b, int64_t e) { INTERNLM2_CPU(ppo_policy_loss_fwd, call.a, b, e); },
                      [&] { INTERNLM2_CPU(ppo_policy_loss_total, call.a); });
}

Tensor ppo_policy_loss_bwd_cpp(const Tensor& dloss, const Tensor& logprobs, const Tensor& old_logprobs,
                               const Tensor& advantages, const Tensor& mask, const Tensor& count, double clip) {
  PpoCall call("ppo_policy_loss", logprobs, old_logprobs, advantages, mask, clip);
  return call.backward(dloss, count, [&](int64_t b, int64_t e) { INTERNLM2_CPU(ppo_policy_loss_bwd, call.a, b, e); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "ppo_policy_loss_fwd.cpp", ppo_policy_loss_fwd_cpp);
  INTERNLM2_IMPL(m, "ppo_policy_loss_bwd.cpp", ppo_policy_loss_bwd_cpp);
}

}  // namespace internlm2
