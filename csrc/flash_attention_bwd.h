// Attention's backward: what it needs beyond flash_attention.h. Method: csrc/cpu/attention_backward.h.
#pragma once
#include "flash_attention.h"

namespace internlm2 {

// A block: multiples of the register tile, whose operands and sums stay in the second-level cache.
constexpr int64_t kBwdQueries = 144, kBwdKeys = 192;

struct FlashBwd : Attention {
  AttentionTensor dout, out;
  void *dq, *dk, *dv;      // contiguous
  const void *lse, *dlse;  // dlse may be null
  // Blocks of queries and of keys before each sequence, [sequences + 1]; the last entries are the totals.
  const int64_t *q_blocks, *k_blocks;
  // A query row and head, laid out as lse, in the accumulator's dtype: lse (base 2 for 16-bit tensors) and delta.
  void *shift, *delta;
  int64_t tokens_q;
  void* dq_sum;    // [heads, tokens_q, columns] in the accumulator's dtype
  int32_t* turns;  // [heads, query blocks], zeros: how many key blocks have added to dq_sum
};

// A part of the work for one thread: one block of keys with all queries of its key head's group that see it; or, to
// prepare, one block of queries of one head. Blocks of queries with keys are counted from the first that sees one.
struct BwdUnit {
  int64_t sequence, head, block;
};

#define INTERNLM2_FLASH_ATTENTION_BWD_CPU                                                        \
  int64_t flash_attention_bwd_columns(const Attention& a); /* d, rounded up to whole vectors */  \
  int64_t flash_attention_bwd_scratch(const Attention& a); /* bytes for each thread */           \
  void flash_attention_bwd_prepare(const FlashBwd& a, const BwdUnit& unit);                      \
  void flash_attention_bwd(const FlashBwd& a, const BwdUnit& unit, void* scratch);

namespace cpu {
namespace AVX2 { INTERNLM2_FLASH_ATTENTION_BWD_CPU }
namespace AVX512 { INTERNLM2_FLASH_ATTENTION_BWD_CPU }
namespace AVX512_BF16 { INTERNLM2_FLASH_ATTENTION_BWD_CPU }
namespace AMX { INTERNLM2_FLASH_ATTENTION_BWD_CPU }
}  // namespace cpu

}  // namespace internlm2
