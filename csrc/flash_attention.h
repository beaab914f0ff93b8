// Attention, forward and backward: the raw-pointer contract between bindings and kernels.
// Formulas: internlm2_kernels/ops/flash_attention.py.
#pragma once
#include "types.h"

// Inlined everywhere: a shared out-of-line copy would be compiled for one of the instruction sets.
#define ATTENTION_INLINE inline __attribute__((always_inline))

namespace internlm2 {

// q, k, v, out or a gradient: [sequences, tokens, heads, d] where dense, [tokens, heads, d] where packed (its sequence
// stride unused); strides in elements, the last one is 1.
struct AttentionTensor {
  const void* data;
  int64_t sequence_stride, token_stride, head_stride;
};

// What forward and backward share. Packed where cu_q, cu_k are given, else every sequence has seqlen_q, seqlen_k tokens.
struct Attention {
  Dtype dtype;
  int64_t sequences, heads, kv_heads, d;
  const int32_t *cu_q, *cu_k;  // [sequences + 1]
  int64_t seqlen_q, seqlen_k;
  const int32_t* seqlens_k;  // [sequences], of a paged cache: in place of cu_k and seqlen_k
  int64_t window_left, window_right;  // -1: unlimited, else at most 2^40
  double scale, softcap;  // from 1e-37 to 1e37; softcap 0: none
  AttentionTensor q, k, v;
  int64_t lse_sequence_stride, lse_head_stride;  // of lse, and of what else is kept a query row and head

  ATTENTION_INLINE int64_t group() const { return heads / kv_heads; }
  ATTENTION_INLINE int64_t begin_q(int64_t s) const { return cu_q ? cu_q[s] : 0; }
  ATTENTION_INLINE int64_t begin_k(int64_t s) const { return cu_k ? cu_k[s] : 0; }
  ATTENTION_INLINE int64_t length_q(int64_t s) const { return cu_q ? cu_q[s + 1] - cu_q[s] : seqlen_q; }
  ATTENTION_INLINE int64_t length_k(int64_t s) const {
    if (seqlens_k) return seqlens_k[s];
    return cu_k ? cu_k[s + 1] - cu_k[s] : seqlen_k;
  }
  // Offset of a sequence's first element of a head, in elements.
  ATTENTION_INLINE int64_t offset_q(const AttentionTensor& t, int64_t s, int64_t head) const {
    return cu_q ? cu_q[s] * t.token_stride + head * t.head_stride : s * t.sequence_stride + head * t.head_stride;
  }
  ATTENTION_INLINE int64_t offset_k(const AttentionTensor& t, int64_t s, int64_t head) const {
    return cu_k ? cu_k[s] * t.token_stride + head * t.head_stride : s * t.sequence_stride + head * t.head_stride;
  }
  ATTENTION_INLINE int64_t offset_lse(int64_t s, int64_t head) const {
    return (cu_q ? cu_q[s] : s * lse_sequence_stride) + head * lse_head_stride;
  }
  // The query rows of a sequence, all at its beginning, that see no key.
  ATTENTION_INLINE int64_t blind_rows(int64_t s) const {
    const int64_t rows = length_q(s), keys = length_k(s), blind = rows - keys - window_right;
    if (keys == 0) return rows;
    return window_right < 0 || blind < 0 ? 0 : blind;
  }
  // Keys [first, last) that query row i may see; last <= first: none. Row i stands at position i + length_k - length_q.
  ATTENTION_INLINE int64_t first_key(int64_t s, int64_t i) const {
    const int64_t position = i + length_k(s) - length_q(s);
    return window_left < 0 || position < window_left ? 0 : position - window_left;
  }
  ATTENTION_INLINE int64_t last_key(int64_t s, int64_t i) const {
    const int64_t position = i + length_k(s) - length_q(s), keys = length_k(s);
    if (window_right < 0 || position + window_right + 1 > keys) return keys;
    return position + window_right < 0 ? 0 : position + window_right + 1;
  }
};

struct FlashFwd : Attention {
  AttentionTensor out;
  void* lse;
};

// A part of the work for one thread: query rows [begin, end) of one sequence with the groups of key heads [kv_head,
// kv_head + kv_heads), and of its splits along the keys all (split < 0) or one, whose unfinished result goes to `state`.
struct FlashUnit {
  int64_t sequence, kv_head, kv_heads, begin, end;
  int64_t split;
  void* state;
};

// How a call is cut, no sequence of which has more than `longest` query rows: rows in a unit, keys in a split. Only a unit of
// at most few_lanes rows times heads of a group takes several key heads. Bytes of scratch a thread, bytes of a state.
struct FlashPlan {
  int64_t rows, split_keys, few_lanes, scratch_bytes, state_bytes;
};

#define INTERNLM2_FLASH_ATTENTION_CPU                                                                 \
  FlashPlan flash_attention_fwd_plan(const FlashFwd& a, int64_t longest);                             \
  void flash_attention_fwd(const FlashFwd& a, const FlashUnit& unit, void* scratch);                  \
  /* The states of all splits that the unit's rows see, in order, `stride` bytes apart. */            \
  void flash_attention_fwd_join(const FlashFwd& a, const FlashUnit& unit, void* states, int64_t stride, int64_t splits, \
                                void* scratch);

namespace cpu {
namespace AVX2 { INTERNLM2_FLASH_ATTENTION_CPU }
namespace AVX512 { INTERNLM2_FLASH_ATTENTION_CPU }
namespace AVX512_BF16 { INTERNLM2_FLASH_ATTENTION_CPU }
namespace AMX { INTERNLM2_FLASH_ATTENTION_CPU }
}  // namespace cpu

}  // namespace internlm2
