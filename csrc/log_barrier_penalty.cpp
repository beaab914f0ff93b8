#include "log_barrier_penalty.h"

#include "threads.h"

namespace internlm2 {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it saves

LogBarrier args_of(const Tensor& rewards, double bound, double margin, bool clamp) {
  LogBarrier a{};
  a.acc = accumulator_tag(rewards);
  a.rewards = in_of(rewards);
  a.bound = bound;
  a.margin = margin;
  a.clamp = clamp;
  return a;
}

Tensor log_barrier_penalty_fwd_cpp(const Tensor& rewards, double bound, double margin, bool clamp) {
  check_cpu();
  Tensor penalty = torch::stable::new_empty(rewards, rewards.sizes(), accumulator_of(rewards));
  LogBarrier a = args_of(rewards, bound, margin, clamp);
  a.penalty = data(penalty);
  for_rows(rewards.numel(), kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(log_barrier_penalty_fwd, a, b, e); });
  return penalty;
}

Tensor log_barrier_penalty_bwd_cpp(const Tensor& dpenalty, const Tensor& rewards, double bound, double margin, bool clamp) {
  check_cpu();
  Tensor drewards = empty_as(rewards);
  LogBarrier a = args_of(rewards, bound, margin, clamp);
  a.dpenalty = cdata(dpenalty);
  a.drewards = out_of(drewards);
  for_rows(rewards.numel(), kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(log_barrier_penalty_bwd, a, b, e); });
  return drewards;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "log_barrier_penalty_fwd.cpp", log_barrier_penalty_fwd_cpp);
  INTERNLM2_IMPL(m, "log_barrier_penalty_bwd.cpp", log_barrier_penalty_bwd_cpp);
}

}  // namespace internlm2
