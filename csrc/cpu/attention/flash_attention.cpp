// Built for: avx2 avx512 avx512_bf16 amx
#include "forward.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {

AttentionTiling flash_attention_fwd_tiling(const FlashFwd& a, int64_t longest) {
  WITH_STORAGE(a.dtype, T, { return tiling_of<T>(a, longest); })
  return {};
}

void flash_attention_fwd(const FlashFwd& a, const AttentionTile& tile, void* scratch) {
  WITH_STORAGE(a.dtype, T, { run_tile<T>(a, tile, DenseKeys<T>(a, tile.sequence), scratch); })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
