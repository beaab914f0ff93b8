#include "flash_attention.h"

#include "attention_args.h"

namespace internlm2 {
namespace {

std::tuple<Tensor, Tensor> flash_attention_fwd_cpp(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_q,
                                                   const OptTensor& cu_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                   int64_t window_left, int64_t window_right, double scale, double softcap) {
  check_cpu();
  FlashFwd a{};
  fill_attention(a, q, k, v, cu_q, cu_k, max_seqlen_q, max_seqlen_k, window_left, window_right, scale, softcap);
  Tensor out = empty_as(q);
  std::vector<int64_t> lse_sizes{a.heads, a.seqlen_q};
  if (!cu_q.has_value()) lse_sizes.insert(lse_sizes.begin(), a.sequences);
  Tensor lse = torch::stable::new_empty(q, lse_sizes, accumulator_of(q));
  a.out = attention_tensor(out);
  a.lse = data(lse);
  run_attention(
      a, q, [&](int64_t longest) { return INTERNLM2_CPU_MATRIX(flash_attention_fwd_tiling, a, longest); },
      [&](const AttentionTile& tile, void* scratch) { INTERNLM2_CPU_MATRIX(flash_attention_fwd, a, tile, scratch); });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) { INTERNLM2_IMPL(m, "flash_attention_fwd.cpp", flash_attention_fwd_cpp); }

}  // namespace internlm2
