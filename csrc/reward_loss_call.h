// One call of reward_loss or reward_loss_from_last, forward or backward, once the arguments are checked.
#pragma once
#include "checks.h"
#include "reward_loss.h"
#include "threads.h"

namespace internlm2 {

using RewardForward = std::tuple<Tensor, Tensor, Tensor>;
using RewardBackward = std::tuple<Tensor, Tensor>;

constexpr int64_t kRewardColumns = 128;  // columns of dweight that a thread takes at a time: a multiple of two vectors

// The arguments that forward and backward share. `where` is the argument that gives the number of sequences, for the error.
inline RewardLoss reward_args(const char* op, const char* where, const Tensor& hidden, const Tensor& weight, int64_t sequences,
                              const int32_t* cu_seqlens) {
  INTERNLM2_CHECK_VALUE(sequences % 2 == 0, op, where, "an even number of sequences, got ", sequences);
  RewardLoss a{};
  a.dtype = dtype_of(hidden);
  a.weight_dtype = dtype_of(weight);
  a.hidden = cdata(hidden);
  a.weight = cdata(weight);
  a.cu_seqlens = cu_seqlens;
  a.tokens = hidden.size(0);
  a.n = sequences;
  a.cols = hidden.size(1);
  a.row_stride = hidden.stride(0);
  return a;
}

inline RewardForward reward_forward(RewardLoss a, const Tensor& hidden, double gamma, double penalty_weight, double bound,
                                    double margin) {
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
  for_rows(a.n, grain_of(65536, a.cols), [&](int64_t b, int64_t e) { INTERNLM2_CPU(reward_loss_rewards, a, b, e); });
  INTERNLM2_CPU(reward_loss_total, a);
  return {loss, rewards, slopes};
}

inline RewardBackward reward_backward(RewardLoss a, const OptTensor& dloss, const OptTensor& drewards, const Tensor& hidden,
                                      const Tensor& weight, const Tensor& slopes, bool needs_dhidden, bool needs_dweight) {
  Tensor dhidden = torch::stable::new_empty(hidden, {needs_dhidden ? a.tokens : 0, a.cols});
  Tensor dweight = torch::stable::new_empty(weight, {needs_dweight ? a.cols : 0});
  Tensor total = torch::stable::new_empty(slopes, {a.n});
  a.dloss = dloss.has_value() ? cdata(*dloss) : nullptr;
  a.drewards = drewards.has_value() ? cdata(*drewards) : nullptr;
  a.slopes = const_cast<void*>(cdata(slopes));  // only read
  a.drewards_total = data(total);
  INTERNLM2_CPU(reward_loss_drewards, a);
  if (needs_dhidden) {
    a.dhidden = data(dhidden);
    for_rows(a.tokens, grain_of(65536, a.cols), [&](int64_t b, int64_t e) { INTERNLM2_CPU(reward_loss_dhidden, a, b, e); });
  }
  if (needs_dweight) {
    a.dweight = data(dweight);
    for_rows((a.cols + kRewardColumns - 1) / kRewardColumns, grain_of(65536 / kRewardColumns, a.n), [&](int64_t b, int64_t e) {
      INTERNLM2_CPU(reward_loss_dweight, a, b * kRewardColumns, std::min(e * kRewardColumns, a.cols));
    });
  }
  return {dhidden, dweight};
}

}  // namespace internlm2
