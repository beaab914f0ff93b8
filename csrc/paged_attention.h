// Attention to a paged cache: the arguments that the binding passes to the kernels, as raw pointers.
// Formulas: internlm2_kernels/ops/paged_attention.py.
#pragma once
#include "flash_attention.h"

namespace internlm2 {

struct PagedFwd : FlashFwd {  // Attention::k and v are unused: keys and values come from the cache
  const void *k_cache, *v_cache;      // contiguous [blocks, block_size, kv_heads, d], dtype or int8
  const float *k_scale, *v_scale;     // contiguous [blocks, block_size, kv_heads], or null
  const int32_t* block_table;         // [sequences, max_blocks]; only the blocks that new tokens see are read
  int64_t block_size, max_blocks;
};

INTERNLM2_CPU_MATRIX_KERNELS(
  AttentionTiling paged_attention_fwd_tiling(const PagedFwd& a, int64_t longest);
  void paged_attention_fwd(const PagedFwd& a, const AttentionTile& tile, void* scratch);)

}  // namespace internlm2
