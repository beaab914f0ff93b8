// From the tensors and options of flash_attention's operators to the kernels' contract, values checked first.
#pragma once
#include <algorithm>

#include "flash_attention.h"
#include "stable.h"

namespace internlm2 {

inline AttentionTensor attention_tensor(const Tensor& t) {
  const int64_t dim = t.dim();
  return {cdata(t), dim == 4 ? t.stride(0) : 0, t.stride(dim - 3), t.stride(dim - 2)};
}

// cu_seqlens (int32, contiguous, CPU) begins at 0, never falls, ends at `total`, and no sequence is longer than `longest`
// (-1: unknown).
inline void check_cu_seqlens(const char* op, const char* side, const Tensor& cu, int64_t total, int64_t longest) {
  const int64_t n = cu.numel();
  const auto* p = static_cast<const int32_t*>(cdata(cu));
  STD_TORCH_CHECK(n >= 1 && p[0] == 0, "ValueError: ", op, ": cu_seqlens_", side, ": expected values that start at 0, got ",
                  n >= 1 ? p[0] : -1);
  int64_t most = 0;
  for (int64_t i = 0; i + 1 < n; ++i) {
    STD_TORCH_CHECK(p[i + 1] >= p[i], "ValueError: ", op, ": cu_seqlens_", side, ": expected values that never fall, got ",
                    p[i + 1], " after ", p[i]);
    most = std::max<int64_t>(most, static_cast<int64_t>(p[i + 1]) - p[i]);
  }
  STD_TORCH_CHECK(p[n - 1] == total, "ValueError: ", op, ": cu_seqlens_", side, ": expected values that end at ", total,
                  ", got ", p[n - 1]);
  STD_TORCH_CHECK(longest < 0 || most <= longest, "ValueError: ", op, ": max_seqlen_", side,
                  ": expected at least the longest sequence, ", most, ", got ", longest);
}

// q and k, v either all packed with both cu_seqlens, or all dense with neither (the public function sees to that).
inline void fill_attention(Attention& a, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_q,
                           const OptTensor& cu_k, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t window_left,
                           int64_t window_right, double scale, double softcap) {
  const bool packed = cu_q.has_value();
  const int64_t dim = q.dim();
  if (packed) {
    check_cu_seqlens("flash_attention", "q", *cu_q, q.size(0), max_seqlen_q);
    check_cu_seqlens("flash_attention", "k", *cu_k, k.size(0), max_seqlen_k);
    a.cu_q = static_cast<const int32_t*>(cdata(*cu_q));
    a.cu_k = static_cast<const int32_t*>(cdata(*cu_k));
  }
  a.dtype = dtype_of(q);
  a.sequences = packed ? cu_q->numel() - 1 : q.size(0);
  a.heads = q.size(dim - 2);
  a.kv_heads = k.size(dim - 2);
  a.d = q.size(dim - 1);
  a.seqlen_q = q.size(dim - 3);
  a.seqlen_k = k.size(dim - 3);
  a.window_left = window_left;
  a.window_right = window_right;
  a.scale = scale;
  a.softcap = softcap;
  a.q = attention_tensor(q);
  a.k = attention_tensor(k);
  a.v = attention_tensor(v);
  a.lse_head_stride = a.seqlen_q;
  a.lse_sequence_stride = a.heads * a.seqlen_q;
}

}  // namespace internlm2
