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

PpoLoss loss_args(const Tensor& x, const Tensor& old, const Tensor& target, const Tensor& mask, double clip) {
  PpoLoss a{};
  a.acc = accumulator_tag(x);
  a.x = in_of(x);
  a.old = in_of(old);
  a.target = in_of(target);
  a.n = x.numel();
  a.mask = mask_of(mask, a.n);
  a.clip = clip;
  return a;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// `chunks` leaves so many `sums` of each chunk, `grain` of them a thread; `total` makes the results of them.
template <typename Chunks, typename Total>
Results forward(const Tensor& x, PpoLoss a, int64_t sums, int64_t grain, const Chunks& chunks, const Total& total) {
  const auto scalar = [&] { return torch::stable::new_empty(x, {}, accumulator_of(x)); };
  Tensor loss = scalar(), clip_fraction = scalar(), statistic = scalar(), count = scalar();
  Partial partial(x, a.n, sums);
  a.partial = partial.data();
  a.loss = data(loss);
  a.clip_fraction = data(clip_fraction);
  a.statistic = data(statistic);
  a.count = data(count);
  for_rows(chunks_of(a.n), grain, [&](int64_t b, int64_t e) { chunks(a, b, e); });
  total(a);
  return {loss, clip_fraction, statistic, count};
}

template <typename Elements>
Tensor backward(const Tensor& dloss, const Tensor& x, PpoLoss a, const Tensor& count, const Elements& elements) {
  Tensor dx = empty_as(x);
  a.dloss = cdata(dloss);
  a.count = const_cast<void*>(cdata(count));  // read alone
  a.dx = out_of(dx);
  for_rows(a.n, kGrain, [&](int64_t b, int64_t e) { elements(a, b, e); });
  return dx;
}

Results ppo_policy_loss_fwd_cpp(const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages,
                                const Tensor& mask, double clip) {
  check_cpu();
  return forward(logprobs, loss_args(logprobs, old_logprobs, advantages, mask, clip), kPolicySums, 2,
                 [](const PpoLoss& a, int64_t b, int64_t e) { INTERNLM2_CPU(ppo_policy_loss_fwd, a, b, e); },
                 [](const PpoLoss& a) { INTERNLM2_CPU(ppo_policy_loss_total, a); });
}

Tensor ppo_policy_loss_bwd_cpp(const Tensor& dloss, const Tensor& logprobs, const Tensor& old_logprobs,
                               const Tensor& advantages, const Tensor& mask, const Tensor& count, double clip) {
  check_cpu();
  return backward(dloss, logprobs, loss_args(logprobs, old_logprobs, advantages, mask, clip), count,
                  [](const PpoLoss& a, int64_t b, int64_t e) { INTERNLM2_CPU(ppo_policy_loss_bwd, a, b, e); });
}

Results ppo_value_loss_fwd_cpp(const Tensor& values, const Tensor& old_values, const Tensor& returns, const Tensor& mask,
                               double clip) {
  check_cpu();
  return forward(values, loss_args(values, old_values, returns, mask, clip), kValueSums, kGrain / kPpoChunk,
                 [](const PpoLoss& a, int64_t b, int64_t e) { INTERNLM2_CPU(ppo_value_loss_fwd, a, b, e); },
                 [](const PpoLoss& a) { INTERNLM2_CPU(ppo_value_loss_total, a); });
}

Tensor ppo_value_loss_bwd_cpp(const Tensor& dloss, const Tensor& values, const Tensor& old_values, const Tensor& returns,
                              const Tensor& mask, const Tensor& count, double clip) {
  check_cpu();
  return backward(dloss, values, loss_args(values, old_values, returns, mask, clip), count,
                  [](const PpoLoss& a, int64_t b, int64_t e) { INTERNLM2_CPU(ppo_value_loss_bwd, a, b, e); });
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
