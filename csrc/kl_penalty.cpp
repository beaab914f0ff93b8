#include "kl_penalty.h"

#include "errors.h"
#include "threads.h"

namespace internlm2 {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it saves

KlPenalty args_of(const Tensor& logprobs, const Tensor& ref_logprobs, const OptTensor& mask, int64_t estimator) {
  INTERNLM2_CHECK_VALUE(estimator >= 1 && estimator <= 3, "kl_penalty", "estimator", "1, 2 or 3, got ", estimator);
  KlPenalty a{};
  a.acc = accumulator_tag(logprobs);
  a.logprobs = in_of(logprobs);
  a.ref_logprobs = in_of(ref_logprobs);
  a.mask = mask.has_value() ? static_cast<const uint8_t*>(cdata(*mask)) : nullptr;
  a.estimator = estimator;
  return a;
}

Tensor kl_penalty_fwd_cpp(const Tensor& logprobs, const Tensor& ref_logprobs, const OptTensor& mask, int64_t estimator) {
  check_cpu();
  KlPenalty a = args_of(logprobs, ref_logprobs, mask, estimator);
  Tensor kl = torch::stable::new_empty(logprobs, logprobs.sizes(), accumulator_of(logprobs));
  a.kl = data(kl);
  for_rows(logprobs.numel(), kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(kl_penalty_fwd, a, b, e); });
  return kl;
}

std::tuple<Tensor, Tensor> kl_penalty_bwd_cpp(const Tensor& dkl, const Tensor& logprobs, const Tensor& ref_logprobs,
                                              const OptTensor& mask, int64_t estimator, bool needs_ref) {
  check_cpu();
  KlPenalty a = args_of(logprobs, ref_logprobs, mask, estimator);
  Tensor dlogprobs = empty_as(logprobs);
  Tensor dref = needs_ref ? empty_as(ref_logprobs) : torch::stable::new_empty(ref_logprobs, {0});
  a.dkl = cdata(dkl);
  a.dlogprobs = out_of(dlogprobs);
  if (needs_ref) a.dref = out_of(dref);
  for_rows(logprobs.numel(), kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(kl_penalty_bwd, a, b, e); });
  return {dlogprobs, dref};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "kl_penalty_fwd.cpp", kl_penalty_fwd_cpp);
  INTERNLM2_IMPL(m, "kl_penalty_bwd.cpp", kl_penalty_bwd_cpp);
}

}  // namespace internlm2
