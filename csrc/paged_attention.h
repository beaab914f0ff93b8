// Attention to a paged cache: the raw-pointer contract between binding and kernels.
// Formulas: internlm2_kernels/ops/paged_attention.py.
#pragma once
#include "flash_attention.h"

namespace internlm2 {

struct PagedFwd : FlashFwd {  // k and v unused
  const void *k_cache, *v_cache;      // contiguous [blocks, block_size, kv_heads, d], dtype or int8
  const float *k_scale, *v_scale;     // contiguous [blocks, block_size, kv_heads], or null
  const int32_t* block_table;         // [sequences, max_blocks]; of a row, the blocks that new tokens see are read
  int64_t block_size, max_blocks;
};

#define INTERNLM2_PAGED_ATTENTION_CPU                                                                  \
  FlashPlan paged_attention_fwd_plan(const PagedFwd& a, int64_t longest);                              \
  void paged_attention_fwd(const PagedFwd& a, const FlashUnit& unit, void* scratch);                   \
  void paged_attention_fwd_join(const PagedFwd& a, const FlashUnit& unit, void* states, int64_t stride, int64_t splits, \
                                void* scratch);

namespace cpu {
namespace AVX2 { INTERNLM2_PAGED_ATTENTION_CPU }
namespace AVX512 { INTERNLM2_PAGED_ATTENTION_CPU }
namespace AVX512_BF16 { INTERNLM2_PAGED_ATTENTION_CPU }
namespace AMX { INTERNLM2_PAGED_ATTENTION_CPU }
}  // namespace cpu

}  // namespace internlm2
