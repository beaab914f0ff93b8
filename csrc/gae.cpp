#include "gae.h"

#include "checks.h"
#include "threads.h"

namespace internlm2 {
namespace {

constexpr int64_t kTokens = 8192;  // a tile is one or more whole sequences that together have at least this many tokens

// The first sequence of every tile, and after them the number of sequences.
std::vector<int64_t> tile_starts(const int32_t* cu, int64_t n) {
  std::vector<int64_t> starts{0};
  for (int64_t i = 1; i <= n; ++i) {
    if (i == n || cu[i] - cu[starts.back()] >= kTokens) starts.push_back(i);
  }
  return starts;
}

std::tuple<Tensor, Tensor> gae_fwd_cpp(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens,
                                       const OptTensor& mask, const OptTensor& bootstrap, double gamma, double lam) {
  check_cpu();
  check_cu_seqlens("gae", "cu_seqlens", cu_seqlens, rewards.numel());
  const auto acc = accumulator_of(rewards);
  Tensor advantages = torch::stable::new_empty(rewards, rewards.sizes(), acc);
  Tensor returns = torch::stable::new_empty(rewards, rewards.sizes(), acc);
  Gae a{accumulator_tag(rewards), in_of(rewards), in_of(values)};
  a.cu_seqlens = static_cast<const int32_t*>(cdata(cu_seqlens));
  if (mask.has_value()) a.mask = static_cast<const uint8_t*>(cdata(*mask));
  if (bootstrap.has_value()) a.bootstrap = cdata(*bootstrap);
  a.advantages = data(advantages);
  a.returns = data(returns);
  a.gamma = gamma;
  a.lam = lam;
  const auto starts = tile_starts(a.cu_seqlens, cu_seqlens.numel() - 1);
  const int64_t tiles = static_cast<int64_t>(starts.size()) - 1;
  for_tiles(tiles, workers_for(tiles), [&](int64_t tile, int64_t) {
    INTERNLM2_CPU(gae_fwd, a, starts[static_cast<size_t>(tile)], starts[static_cast<size_t>(tile) + 1]);
  });
  return {advantages, returns};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) { INTERNLM2_IMPL(m, "gae_fwd.cpp", gae_fwd_cpp); }

}  // namespace internlm2
