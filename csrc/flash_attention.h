// Attention, forward and backward: the arguments that the binding passes to the kernels, as raw pointers.
// Formulas: internlm2_kernels/ops/flash_attention.py.
#pragma once
#include "types.h"

// Always inlined: the linker would keep a single out-of-line copy for all builds, perhaps that of AVX-512, which other
// processors cannot run.
#define ATTENTION_INLINE inline __attribute__((always_inline))

namespace internlm2 {

// q, k, v, out or a gradient of them: [sequences, tokens, heads, d] where dense, [tokens, heads, d] where packed
// (sequence_stride is then unused). Strides are in elements; that of d is 1.
struct AttentionTensor {
  const void* data;
  int64_t sequence_stride, token_stride, head_stride;
};

// The arguments that forward and backward share. The sequences are packed where cu_q and cu_k are given. Otherwise every
// sequence has seqlen_q queries and seqlen_k keys.
struct Attention {
  Dtype dtype;
  int64_t sequences, heads, kv_heads, d;
  const int32_t *cu_q, *cu_k;  // [sequences + 1]
  int64_t seqlen_q, seqlen_k;
  const int32_t* seqlens_k;  // [sequences], the length of each in a paged cache; null without one: cu_k or seqlen_k then
  int64_t window_left, window_right;  // -1: unlimited, else at most 2^40
  double scale, softcap;  // each from 1e-37 to 1e37; softcap 0: no soft-cap
  AttentionTensor q, k, v;
  int64_t lse_sequence_stride, lse_head_stride;  // of lse, and in the backward of dlse, shift and delta

  ATTENTION_INLINE int64_t group() const { return heads / kv_heads; }
  ATTENTION_INLINE int64_t length_q(int64_t s) const { return cu_q ? cu_q[s + 1] - cu_q[s] : seqlen_q; }
  ATTENTION_INLINE int64_t length_k(int64_t s) const {
    if (seqlens_k) return seqlens_k[s];
    return cu_k ? cu_k[s + 1] - cu_k[s] : seqlen_k;
  }
  // Where the first token of sequence s begins in a head of t, in elements.
  ATTENTION_INLINE int64_t offset_q(const AttentionTensor& t, int64_t s, int64_t head) const {
    return cu_q ? cu_q[s] * t.token_stride + head * t.head_stride : s * t.sequence_stride + head * t.head_stride;
  }
  ATTENTION_INLINE int64_t offset_k(const AttentionTensor& t, int64_t s, int64_t head) const {
    return cu_k ? cu_k[s] * t.token_stride + head * t.head_stride : s * t.sequence_stride + head * t.head_stride;
  }
  ATTENTION_INLINE int64_t offset_lse(int64_t s, int64_t head) const {
    return (cu_q ? cu_q[s] : s * lse_sequence_stride) + head * lse_head_stride;
  }
  // How many query rows of a sequence are fully masked. They are its first rows.
  ATTENTION_INLINE int64_t fully_masked_rows(int64_t s) const {
    const int64_t rows = length_q(s), keys = length_k(s), masked = rows - keys - window_right;
    if (keys == 0) return rows;
    return window_right < 0 || masked < 0 ? 0 : masked;
  }
  // The unmasked keys of query row i are [first_key, last_key), none where last_key <= first_key. The row's position among
  // the keys is i + length_k - length_q.
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

// A tile of the forward, computed by one thread: query rows [begin, end) of one sequence, with all query heads of the key heads
// [kv_head, kv_head + kv_heads). There are three kinds:
//   split < 0, splits == 0   the whole tile over all keys.
//   split >= 0               one split of it along the keys (split-K), which leaves its partial result in `state`.
//   split < 0, splits > 0    joins the partial results of all its splits, which stand in rising order at `state`.
struct AttentionTile {
  int64_t sequence, kv_head, kv_heads, begin, end;
  int64_t split = -1, splits = 0, state_bytes = 0;  // state_bytes: between two partial results
  void* state = nullptr;
};

// How a forward is divided into tiles.
struct AttentionTiling {
  int64_t rows;           // query rows of a tile
  int64_t split_keys;     // keys of a split
  int64_t decode_lanes;   // a tile of at most so many lanes (rows times query heads of a group) may take several key heads
  int64_t scratch_bytes;  // scratch memory of each thread
  int64_t state_bytes;    // the partial result of a split
};

INTERNLM2_CPU_MATRIX_KERNELS(
  AttentionTiling flash_attention_fwd_tiling(const FlashFwd& a, int64_t longest);
  void flash_attention_fwd(const FlashFwd& a, const AttentionTile& tile, void* scratch);)

}  // namespace internlm2
