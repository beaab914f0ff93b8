#include "attention.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

template <typename T> void unit_of(const FlashFwd& a, const FlashUnit& u, void* scratch) {
  const DenseKeys<T> keys{static_cast<const T*>(a.k.data) + a.offset_k(a.k, u.sequence, u.kv_head),
                          static_cast<const T*>(a.v.data) + a.offset_k(a.v, u.sequence, u.kv_head),
                          a.k.token_stride, a.v.token_stride, 0};
  Unit<T, DenseKeys<T>> unit(a, u, keys, scratch);
  unit.prepare();
  unit.run();
  unit.finish(a.out, a.lse);
}

}  // namespace

int64_t flash_attention_fwd_rows(const Attention& a) { return greater(1, kLanes / a.group()); }

int64_t flash_attention_fwd_scratch(const Attention& a) {
  int64_t bytes = 0;
  WITH_STORAGE(a.dtype, T, { bytes = UnitScratch<T>(flash_attention_fwd_rows(a) * a.group(), a.d, nullptr).bytes; })
  return bytes;
}

void flash_attention_fwd(const FlashFwd& a, const FlashUnit& unit, void* scratch) {
  WITH_STORAGE(a.dtype, T, { unit_of<T>(a, unit, scratch); })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
