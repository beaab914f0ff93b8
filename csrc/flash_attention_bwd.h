// The backward of attention: what it needs beyond flash_attention.h. Method: csrc/cpu/attention/flash_attention_bwd.cpp.
#pragma once
#include "flash_attention.h"

namespace internlm2 {

// A block of queries against a block of keys. Both are multiples of the register tile, and the operands and sums of a block
// stay in the second-level cache.
constexpr int64_t kBwdQueries = 144, kBwdKeys = 192;

struct FlashBwd : Attention {
  AttentionTensor dout, out;
  void *dq, *dk, *dv;      // contiguous
  const void *lse, *dlse;  // dlse may be null
  // Blocks of queries and of keys before each sequence, [sequences + 1]; the last entries are the totals.
  const int64_t *q_blocks, *k_blocks;
  // One number for each query row and head, laid out as lse, in the accumulator's dtype: lse (to base 2 for 16-bit tensors)
  // and delta, the sum over d of dout * out, less dlse.
  void *shift, *delta;
  int64_t tokens_q;
  void* dq_sum;    // [heads, tokens_q, columns] in the accumulator's dtype
  int32_t* turns;  // [heads, query blocks], zeros: how many key blocks have added to dq_sum
};

// A tile of work for one thread: one block of keys against all queries of its key head's group that see it; for
// flash_attention_bwd_prepare, one block of queries of one head. Where they meet keys, blocks of queries are counted from the
// first query row that is not fully masked.
struct BwdTile {
  int64_t sequence, head, block;
};

struct BwdSizes {
  int64_t columns;        // d, rounded up to whole vectors
  int64_t scratch_bytes;  // for each thread
};

INTERNLM2_CPU_MATRIX_KERNELS(
  BwdSizes flash_attention_bwd_sizes(const Attention& a);
  void flash_attention_bwd_prepare(const FlashBwd& a, const BwdTile& tile);
  void flash_attention_bwd(const FlashBwd& a, const BwdTile& tile, void* scratch);)

}  // namespace internlm2
