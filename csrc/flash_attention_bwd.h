// The backward of attention: what it needs beyond flash_attention.h. Method: csrc/cpu/attention/flash_attention_bwd.cpp.
#pragma once
#include "flash_attention.h"

namespace internlm2 {

// The backward works on one block of queries against one block of keys at a time. These are their sizes in rows: multiples of
// the register tile (gemm/product.h), and small enough that the operands and sums of a pair stay in the second-level cache.
constexpr int64_t kBwdQueries = 144, kBwdKeys = 192;

struct FlashBwd : Attention {
  AttentionTensor dout, out;
  void *dq, *dk, *dv;      // contiguous
  const void *lse, *dlse;  // dlse may be null
  // [sequences + 1]: how many blocks of queries, and of keys, all sequences before s have together; the last entries are the
  // totals.
  const int64_t *q_blocks, *k_blocks;
  // Laid out as lse, in the accumulator's dtype. shift: the lse that is subtracted from the scores, to base 2 for 16-bit
  // tensors. delta: the sum over d of dout * out, minus dlse.
  void *shift, *delta;
  int64_t tokens_q;  // query rows of all sequences together
  void* dq_sum;    // [heads, tokens_q, columns] in the accumulator's dtype
  int32_t* turns;  // [heads, query blocks], zeros at first: how many key blocks have added their part to this block's dq_sum
};

// A tile of work for one thread. For flash_attention_bwd: block `block` of keys of key head `head`, against all queries of the
// head's group that see one of these keys; the blocks of queries begin at the first row that is not fully masked. For
// flash_attention_bwd_prepare: block `block` of queries of query head `head`, counted from row 0.
struct BwdTile {
  int64_t sequence, head, block;
};

struct BwdSizes {
  int64_t columns;        // d, rounded up to whole vectors
  int64_t scratch_bytes;  // scratch memory of each thread
};

INTERNLM2_CPU_MATRIX_KERNELS(
  BwdSizes flash_attention_bwd_sizes(const Attention& a);
  void flash_attention_bwd_prepare(const FlashBwd& a, const BwdTile& tile);
  void flash_attention_bwd(const FlashBwd& a, const BwdTile& tile, void* scratch);)

}  // namespace internlm2
