#include "ppo.h"

#include "stable.h"

namespace internlm2 {
namespace {

constexpr int64_t kGrain = 16384;  // elements

const uint8_t* mask_of(const Tensor& mask, int64_t n) {
  STD_TORCH_CHECK(mask.scalar_type() == torch::headeronly::ScalarType::Bool && mask.numel() == n,
                  "ValueError: mask: expected a bool for each of ", n, " entries, got ", mask.numel());
  return static_cast<const uint8_t*>(cdata(mask));
}

int64_t chunks_of(int64_t n) { return (n + kPpoChunk - 1) / kPpoChunk; }

// Rows of sums, one a chunk: on the stack for as many as a small call has.
class Partial {
 public:
  Partial(const Tensor& like, int64_t n, int64_t sums) {
    if (chunks_of(n) * sums <= kHere) return;
    there_ = torch::stable::new_empty(like, {chunks_of(n), sums}, torch::headeronly::ScalarType::Double);
  }
  double* data() { return there_.has_value() ? static_cast<double*>(internlm2::data(*there_)) : here_; }

 private:
  static constexpr int64_t kHere = 256;
  double here_[kHere];
  OptTensor there_;
};
Tensor scalar(const Tensor& like) { return torch::stable::new_empty(like, {}, accumulator_of(like)); }

PolicyLoss policy_args(const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const Tensor& mask,
                       double clip) {
  PolicyLoss a{};
  a.acc = accumulator_tag(logprobs);
  a.logprobs = in_of(logprobs);
  a.old_logprobs = in_of(old_logprobs);
  a.advantages = in_of(advantages);
  a.n = logprobs.numel();
  a.mask = mask_of(mask, a.n);
  a.clip = clip;
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_policy_loss_fwd_cpp(const Tensor& logprobs, const Tensor& old_logprobs,
                                                                   const Tensor& advantages, const Tensor& mask,
                                                                   double clip) {
  check_cpu();
  Tensor loss = scalar(logprobs), clip_fraction = scalar(logprobs), approx_kl = scalar(logprobs), count = scalar(logprobs);
  PolicyLoss a = policy_args(logprobs, old_logprobs, advantages, mask, clip);
  Partial partial(logprobs, a.n, kPolicySums);
  a.partial = partial.data();
  a.loss = data(loss);
  a.clip_fraction = data(clip_fraction);
  a.approx_kl = data(approx_kl);
  a.count = data(count);
  for_rows(chunks_of(a.n), 2, [&](int64_t b, int64_t e) { INTERNLM2_CPU(ppo_policy_loss_fwd, a, b, e); });
  INTERNLM2_CPU(ppo_policy_loss_total, a);
  return {loss, clip_fraction, approx_kl, count};
}

Tensor ppo_policy_loss_bwd_cpp(const Tensor& dloss, const Tensor& logprobs, const Tensor& old_logprobs,
                               const Tensor& advantages, const Tensor& mask, const Tensor& count, double clip) {
  check_cpu();
  Tensor dlogprobs = empty_as(logprobs);
  PolicyLoss a = policy_args(logprobs, old_logprobs, advantages, mask, clip);
  a.dloss = cdata(dloss);
  a.count = const_cast<void*>(cdata(count));  // read alone
  a.dlogprobs = out_of(dlogprobs);
  for_rows(a.n, kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(ppo_policy_loss_bwd, a, b, e); });
  return dlogprobs;
}

ValueLoss value_args(const Tensor& values, const Tensor& old_values, const Tensor& returns, const Tensor& mask,
                     double clip) {
  ValueLoss a{};
  a.acc = accumulator_tag(values);
  a.values = in_of(values);
  a.old_values = in_of(old_values);
  a.returns = in_of(returns);
  a.n = values.numel();
  a.mask = mask_of(mask, a.n);
  a.clip = clip;
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_value_loss_fwd_cpp(const Tensor& values, const Tensor& old_values,
                                                                  const Tensor& returns, const Tensor& mask,
                                                                  double clip) {
  check_cpu();
  Tensor loss = scalar(values), clip_fraction = scalar(values), explained = scalar(values), count = scalar(values);
  ValueLoss a = value_args(values, old_values, returns, mask, clip);
  Partial partial(values, a.n, kValueSums);
  a.partial = partial.data();
  a.loss = data(loss);
  a.clip_fraction = data(clip_fraction);
  a.explained_variance = data(explained);
  a.count = data(count);
  for_rows(chunks_of(a.n), kGrain / kPpoChunk, [&](int64_t b, int64_t e) { INTERNLM2_CPU(ppo_value_loss_fwd, a, b, e); });
  INTERNLM2_CPU(ppo_value_loss_total, a);
  return {loss, clip_fraction, explained, count};
}

Tensor ppo_value_loss_bwd_cpp(const Tensor& dloss, const Tensor& values, const Tensor& old_values, const Tensor& returns,
                              const Tensor& mask, const Tensor& count, double clip) {
  check_cpu();
  Tensor dvalues = empty_as(values);
  ValueLoss a = value_args(values, old_values, returns, mask, clip);
  a.dloss = cdata(dloss);
  a.count = const_cast<void*>(cdata(count));  // read alone
  a.dvalues = out_of(dvalues);
  for_rows(a.n, kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(ppo_value_loss_bwd, a, b, e); });
  return dvalues;
}

KlPenalty kl_args(const Tensor& logprobs, const Tensor& ref_logprobs, int64_t estimator) {
  STD_TORCH_CHECK(estimator >= 1 && estimator <= 3, "ValueError: estimator: expected 1, 2 or 3, got ", estimator);
  KlPenalty a{};
  a.acc = accumulator_tag(logprobs);
  a.logprobs = in_of(logprobs);
  a.ref_logprobs = in_of(ref_logprobs);
  a.estimator = estimator;
  return a;
}

Tensor kl_penalty_fwd_cpp(const Tensor& logprobs, const Tensor& ref_logprobs, int64_t estimator) {
  check_cpu();
  KlPenalty a = kl_args(logprobs, ref_logprobs, estimator);
  Tensor kl = torch::stable::new_empty(logprobs, logprobs.sizes(), accumulator_of(logprobs));
  a.kl = data(kl);
  for_rows(logprobs.numel(), kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(kl_penalty_fwd, a, b, e); });
  return kl;
}

std::tuple<Tensor, Tensor> kl_penalty_bwd_cpp(const Tensor& dkl, const Tensor& logprobs, const Tensor& ref_logprobs,
                                              int64_t estimator, bool needs_ref) {
  check_cpu();
  KlPenalty a = kl_args(logprobs, ref_logprobs, estimator);
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
  INTERNLM2_IMPL(m, "ppo_policy_loss_fwd.cpp", ppo_policy_loss_fwd_cpp);
  INTERNLM2_IMPL(m, "ppo_policy_loss_bwd.cpp", ppo_policy_loss_bwd_cpp);
  INTERNLM2_IMPL(m, "ppo_value_loss_fwd.cpp", ppo_value_loss_fwd_cpp);
  INTERNLM2_IMPL(m, "ppo_value_loss_bwd.cpp", ppo_value_loss_bwd_cpp);
  INTERNLM2_IMPL(m, "kl_penalty_fwd.cpp", kl_penalty_fwd_cpp);
  INTERNLM2_IMPL(m, "kl_penalty_bwd.cpp", kl_penalty_bwd_cpp);
}

}  // namespace internlm2
