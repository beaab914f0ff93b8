#include "reward.h"

#include <algorithm>

#include "stable.h"

namespace internlm2 {
namespace {

constexpr int64_t kGrain = 16384;  // elements of the pairwise losses
constexpr int64_t kColumns = 128;  // the unit in which the head's gradient is shared out: whole pairs of vectors

// -------------------------------------------------------------------------------------- focal loss, barrier: elements
FocalRanking focal_args(const Tensor& chosen, const Tensor& rejected, double gamma) {
  FocalRanking a{};
  a.acc = accumulator_tag(chosen);
  a.chosen = in_of(chosen);
  a.rejected = in_of(rejected);
  a.gamma = gamma;
  return a;
}

Tensor focal_ranking_loss_fwd_cpp(const Tensor& chosen, const Tensor& rejected, double gamma) {
  check_cpu();
  Tensor loss = torch::stable::new_empty(chosen, chosen.sizes(), accumulator_of(chosen));
  FocalRanking a = focal_args(chosen, rejected, gamma);
  a.loss = data(loss);
  for_rows(chosen.numel(), kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(focal_ranking_loss_fwd, a, b, e); });
  return loss;
}

std::tuple<Tensor, Tensor> focal_ranking_loss_bwd_cpp(const Tensor& dloss, const Tensor& chosen, const Tensor& rejected,
                                                      double gamma) {
  check_cpu();
  Tensor dchosen = empty_as(chosen), drejected = empty_as(rejected);
  FocalRanking a = focal_args(chosen, rejected, gamma);
  a.dloss = cdata(dloss);
  a.dchosen = out_of(dchosen);
  a.drejected = out_of(drejected);
  for_rows(chosen.numel(), kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(focal_ranking_loss_bwd, a, b, e); });
  return {dchosen, drejected};
}

LogBarrier barrier_args(const Tensor& rewards, double bound, double margin, bool clamp) {
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
  LogBarrier a = barrier_args(rewards, bound, margin, clamp);
  a.penalty = data(penalty);
  for_rows(rewards.numel(), kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(log_barrier_penalty_fwd, a, b, e); });
  return penalty;
}

Tensor log_barrier_penalty_bwd_cpp(const Tensor& dpenalty, const Tensor& rewards, double bound, double margin, bool clamp) {
  check_cpu();
  Tensor drewards = empty_as(rewards);
  LogBarrier a = barrier_args(rewards, bound, margin, clamp);
  a.dpenalty = cdata(dpenalty);
  a.drewards = out_of(drewards);
  for_rows(rewards.numel(), kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(log_barrier_penalty_bwd, a, b, e); });
  return drewards;
}

// ------------------------------------------------------------------------------------------ from hidden states to loss
RewardLoss reward_args(const Tensor& hidden, const Tensor& weight, const Tensor* cu_seqlens) {
  RewardLoss a{};
  a.dtype = dtype_of(hidden);
  a.weight_dtype = dtype_of(weight);
  a.hidden = cdata(hidden);
  a.weight = cdata(weight);
  a.tokens = hidden.size(0);
  a.n = a.tokens;
  a.cols = hidden.size(1);
  a.row_stride = hidden.stride(0);
  if (cu_seqlens != nullptr) {
    check_lengths(*cu_seqlens, a.tokens, 1);
    a.cu_seqlens = static_cast<const int32_t*>(cdata(*cu_seqlens));
    a.n = cu_seqlens->numel() - 1;
  }
  STD_TORCH_CHECK(a.n % 2 == 0, "ValueError: ", cu_seqlens ? "cu_seqlens" : "last_hidden",
                  ": expected an even number of sequences, got ", a.n);
  return a;
}

int64_t grain(int64_t cols) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(cols, 1)); }

using Forward = std::tuple<Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor>;

Forward forward(RewardLoss a, const Tensor& hidden, double gamma, double penalty_weight, double bound, double margin) {
  const auto acc = accumulator_of(hidden);
  Tensor loss = torch::stable::new_empty(hidden, {}, acc), rewards = torch::stable::new_empty(hidden, {a.n}, acc);
  Tensor slopes = torch::stable::new_empty(hidden, {a.n}, acc);
  a.gamma = gamma;
  a.penalty_weight = penalty_weight;
  a.bound = bound;
  a.margin = margin;
  a.loss = data(loss);
  a.rewards = data(rewards);
  a.slopes = data(slopes);
  for_rows(a.n, grain(a.cols), [&](int64_t b, int64_t e) { INTERNLM2_CPU(reward_loss_rewards, a, b, e); });
  INTERNLM2_CPU(reward_loss_total, a);
  return {loss, rewards, slopes};
}

Backward backward(RewardLoss a, const OptTensor& dloss, const OptTensor& drewards, const Tensor& hidden,
                  const Tensor& weight, const Tensor& slopes, bool needs_dhidden, bool needs_dweight) {
  Tensor dhidden = torch::stable::new_empty(hidden, {needs_dhidden ? a.tokens : 0, a.cols});
  Tensor dweight = torch::stable::new_empty(weight, {needs_dweight ? a.cols : 0});
  Tensor total = torch::stable::new_empty(slopes, {a.n});
  a.dloss = dloss.has_value() ? cdata(*dloss) : nullptr;
  a.drewards = drewards.has_value() ? cdata(*drewards) : nullptr;
  a.slopes = const_cast<void*>(cdata(slopes));  // read alone
  a.drewards_total = data(total);
  INTERNLM2_CPU(reward_loss_drewards, a);
  if (needs_dhidden) {
    a.dhidden = data(dhidden);
    for_rows(a.tokens, grain(a.cols), [&](int64_t b, int64_t e) { INTERNLM2_CPU(reward_loss_dhidden, a, b, e); });
  }
  if (needs_dweight) {
    a.dweight = data(dweight);
    for_rows((a.cols + kColumns - 1) / kColumns, std::max<int64_t>(1, 65536 / (kColumns * std::max<int64_t>(a.n, 1))),
             [&](int64_t b, int64_t e) {
               INTERNLM2_CPU(reward_loss_dweight, a, b * kColumns, std::min(e * kColumns, a.cols));
             });
  }
  return {dhidden, dweight};
}

Forward reward_loss_fwd_cpp(const Tensor& hidden, const Tensor& weight, const Tensor& cu_seqlens, double gamma,
                            double penalty_weight, double bound, double margin) {
  check_cpu();
  return forward(reward_args(hidden, weight, &cu_seqlens), hidden, gamma, penalty_weight, bound, margin);
}

Backward reward_loss_bwd_cpp(const OptTensor& dloss, const OptTensor& drewards, const Tensor& hidden, const Tensor& weight,
                             const Tensor& cu_seqlens, const Tensor& slopes, bool needs_dhidden, bool needs_dweight) {
  check_cpu();
  return backward(reward_args(hidden, weight, &cu_seqlens), dloss, drewards, hidden, weight, slopes, needs_dhidden,
                  needs_dweight);
}

Forward reward_loss_from_last_fwd_cpp(const Tensor& last_hidden, const Tensor& weight, double gamma, double penalty_weight,
                                      double bound, double margin) {
  check_cpu();
  return forward(reward_args(last_hidden, weight, nullptr), last_hidden, gamma, penalty_weight, bound, margin);
}

Backward reward_loss_from_last_bwd_cpp(const OptTensor& dloss, const OptTensor& drewards, const Tensor& last_hidden,
                                       const Tensor& weight, const Tensor& slopes, bool needs_dhidden, bool needs_dweight) {
  check_cpu();
  return backward(reward_args(last_hidden, weight, nullptr), dloss, drewards, last_hidden, weight, slopes, needs_dhidden,
                  needs_dweight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "focal_ranking_loss_fwd.cpp", focal_ranking_loss_fwd_cpp);
  INTERNLM2_IMPL(m, "focal_ranking_loss_bwd.cpp", focal_ranking_loss_bwd_cpp);
  INTERNLM2_IMPL(m, "log_barrier_penalty_fwd.cpp", log_barrier_penalty_fwd_cpp);
  INTERNLM2_IMPL(m, "log_barrier_penalty_bwd.cpp", log_barrier_penalty_bwd_cpp);
  INTERNLM2_IMPL(m, "reward_loss_fwd.cpp", reward_loss_fwd_cpp);
  INTERNLM2_IMPL(m, "reward_loss_bwd.cpp", reward_loss_bwd_cpp);
  INTERNLM2_IMPL(m, "reward_loss_from_last_fwd.cpp", reward_loss_from_last_fwd_cpp);
  INTERNLM2_IMPL(m, "reward_loss_from_last_bwd.cpp", reward_loss_from_last_bwd_cpp);
}

}  // namespace internlm2
