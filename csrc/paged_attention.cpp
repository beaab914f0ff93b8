#include "paged_attention.h"

#include "attention_args.h"

namespace internlm2 {
namespace {

constexpr const char* kOp = "paged_attention";

// Checks the values of each sequence that has new tokens: its length in the cache is at least the number of its new tokens and
// fits the block table, and each entry of the block table that a new token needs is the number of a block of the cache.
void check_values(const PagedFwd& a, int64_t blocks) {
  for (int64_t s = 0; s < a.sequences; ++s) {
    if (a.length_q(s) == 0) continue;
    const int64_t length = a.length_k(s), most = a.max_blocks * a.block_size;
    INTERNLM2_CHECK_VALUE(length >= a.length_q(s) && length <= most, kOp, "seq_lens",
                          "values from the new tokens of a sequence, ", a.length_q(s), " in sequence ", s,
                          ", to max_blocks * block_size = ", most, ", got ", length);
    const int64_t used = (length + a.block_size - 1) / a.block_size;
    for (int64_t i = a.first_key(s, 0) / a.block_size; i < used; ++i) {
      const int64_t block = a.block_table[s * a.max_blocks + i];
      INTERNLM2_CHECK_VALUE(block >= 0 && block < blocks, kOp, "block_table", "values from 0 to ", blocks - 1,
                            " in the blocks in use, got ", block);
    }
  }
}

std::tuple<Tensor, Tensor> paged_attention_fwd_cpp(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                   const Tensor& block_table, const Tensor& seq_lens, const OptTensor& cu_q,
                                                   int64_t max_seqlen_q, const OptTensor& k_scale, const OptTensor& v_scale,
                                                   int64_t window_left, double scale, double softcap) {
  check_cpu();
  PagedFwd a{};
  a.dtype = dtype_of(q);
  a.sequences = seq_lens.size(0);
  a.heads = q.size(1);
  a.kv_heads = k_cache.size(2);
  a.d = q.size(2);
  a.seqlen_q = 1;
  a.seqlens_k = static_cast<const int32_t*>(cdata(seq_lens));
  a.window_left = window_left;
  a.scale = scale;
  a.softcap = softcap;
  a.k_cache = cdata(k_cache);
  a.v_cache = cdata(v_cache);
  a.k_scale = k_scale.has_value() ? static_cast<const float*>(cdata(*k_scale)) : nullptr;
  a.v_scale = v_scale.has_value() ? static_cast<const float*>(cdata(*v_scale)) : nullptr;
  a.block_table = static_cast<const int32_t*>(cdata(block_table));
  a.block_size = k_cache.size(1);
  a.max_blocks = block_table.size(1);
  if (cu_q.has_value()) {
    a.cu_q = checked_cu_seqlens(kOp, "q", *cu_q, q.size(0), max_seqlen_q);
  }
  check_values(a, k_cache.size(0));
  Tensor out = empty_as(q), lse = torch::stable::new_empty(q, {a.heads, q.size(0)}, accumulator_of(q));
  a.q = attention_tensor(q);
  a.out = attention_tensor(out);
  a.q.sequence_stride = a.q.token_stride;  // used where there is no cu_q: each sequence then has one new token
  a.out.sequence_stride = a.out.token_stride;
  a.lse = data(lse);
  a.lse_sequence_stride = 1;
  a.lse_head_stride = q.size(0);
  run_attention(
      a, q, [&](int64_t longest) { return INTERNLM2_CPU_MATRIX(paged_attention_fwd_tiling, a, longest); },
      [&](const AttentionTile& tile, void* scratch) { INTERNLM2_CPU_MATRIX(paged_attention_fwd, a, tile, scratch); });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) { INTERNLM2_IMPL(m, "paged_attention_fwd.cpp", paged_attention_fwd_cpp); }

}  // namespace internlm2
