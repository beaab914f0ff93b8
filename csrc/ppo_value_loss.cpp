#include "ppo_loss_call.h"

namespace internlm2 {
namespace {

PpoResults ppo_value_loss_fwd_cpp(const Tensor& values, const Tensor& old_values, const Tensor& returns, const Tensor& mask,
                                  double clip) {
  PpoCall call("ppo_value_loss", values, old_values, returns, mask, clip);
  return call.forward(kValueSums, PpoCall::kGrain / kPpoChunk,
                      [&](int64_t b, int64_t e) { INTERNLM2_CPU(ppo_value_loss_fwd, call.a, b, e); },
                      [&] { INTERNLM2_CPU(ppo_value_loss_total, call.a); });
}

Tensor ppo_value_loss_bwd_cpp(const Tensor& dloss, const Tensor& values, const Tensor& old_values, const Tensor& returns,
                              const Tensor& mask, const Tensor& count, double clip) {
  PpoCall call("ppo_value_loss", values, old_values, returns, mask, clip);
  return call.backward(dloss, count, [&](int64_t b, int64_t e) { INTERNLM2_CPU(ppo_value_loss_bwd, call.a, b, e); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "ppo_value_loss_fwd.cpp", ppo_value_loss_fwd_cpp);
  INTERNLM2_IMPL(m, "ppo_value_loss_bwd.cpp", ppo_value_loss_bwd_cpp);
}

}  // namespace internlm2
