#include "focal_ranking_loss.h"

#include "threads.h"

namespace internlm2 {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it saves

FocalRanking args_of(const Tensor& chosen, const Tensor& rejected, double gamma) {
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
  FocalRanking a = args_of(chosen, rejected, gamma);
  a.loss = data(loss);
  for_rows(chosen.numel(), kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(focal_ranking_loss_fwd, a, b, e); });
  return loss;
}

std::tuple<Tensor, Tensor> focal_ranking_loss_bwd_cpp(const Tensor& dloss, const Tensor& chosen, const Tensor& rejected,
                                                      double gamma) {
  check_cpu();
  Tensor dchosen = empty_as(chosen), drejected = empty_as(rejected);
  FocalRanking a = args_of(chosen, rejected, gamma);
  a.dloss = cdata(dloss);
  a.dchosen = out_of(dchosen);
  a.drejected = out_of(drejected);
  for_rows(chosen.numel(), kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(focal_ranking_loss_bwd, a, b, e); });
  return {dchosen, drejected};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "focal_ranking_loss_fwd.cpp", focal_ranking_loss_fwd_cpp);
  INTERNLM2_IMPL(m, "focal_ranking_loss_bwd.cpp", focal_ranking_loss_bwd_cpp);
}

}  // namespace internlm2
