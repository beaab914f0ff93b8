#include "attention_forward.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {

FlashPlan flash_attention_fwd_plan(const FlashFwd& a, int64_t longest) {
  WITH_STORAGE(a.dtype, T, { return plan_of<T>(a, longest); })
  return {};
}

void flash_attention_fwd(const FlashFwd& a, const FlashUnit& unit, void* scratch) {
  WITH_STORAGE(a.dtype, T, {
    const DenseKeys<T> keys(a, unit.sequence);
    with_form<T>(a, unit, keys, scratch, [&](auto& form) VEC_LAMBDA { run_unit(form, a, unit); });
  })
}

void flash_attention_fwd_join(const FlashFwd& a, const FlashUnit& unit, void* states, int64_t stride, int64_t splits,
                              void* scratch) {
  WITH_STORAGE(a.dtype, T, {
    const DenseKeys<T> keys(a, unit.sequence);
    with_form<T>(a, unit, keys, scratch, [&](auto& form) VEC_LAMBDA { join_unit(form, a, states, stride, splits); });
  })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
