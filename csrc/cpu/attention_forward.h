// One unit of attention's forward, from its keys to its rows of the result, in the form that its number of lanes asks for.
#pragma once
#include "attention_few.h"
#include "attention_unit.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

// Tiles sum in an order of their own: at that level decoding is a unit of many lanes, to give the bits of a prefill.
template <typename T> constexpr int64_t kFew = kTiles<matrix_t<T>> ? 0 : kFewLanes;

template <typename T> VEC_INLINE FlashPlan plan_of(const Attention& a, int64_t longest) {
  const int64_t rows = greater(1, lesser(longest, kLanes / a.group())), lanes = rows * a.group();
  UnitScratch<T> many(lanes, a.d, nullptr);
  FewScratch<T> few(a.kv_heads, lesser(lanes, kFew<T>), a.d, nullptr);
  Carver state(nullptr), other(nullptr);
  many.part.carve(state, many.lanes, a.d);
  few.part.carve(other, few.lanes, few.width);
  return {rows, kSplit, kFew<T>, greater(many.bytes, few.bytes), greater(state.bytes, other.bytes)};
}

template <typename Form> VEC_INLINE void run_unit(Form& form, const FlashFwd& a, const FlashUnit& u) {
  using Acc = std::remove_pointer_t<decltype(form.part().m)>;
  if (u.split >= 0) return form.split(u.split * kSplit, form.state_at(u.state));
  const int64_t first = form.first_key(), last = form.last_key();
  if (last <= first) form.clear();
  for (int64_t begin = first / kSplit * kSplit; begin < last; begin += kSplit) {
    form.split(begin, form.part());
    form.join(form.part(), begin <= first);
  }
  form.finish(a.out, static_cast<Acc*>(a.lse));
}

template <typename Form>
VEC_INLINE void join_unit(Form& form, const FlashFwd& a, void* states, int64_t stride, int64_t splits) {
  using Acc = std::remove_pointer_t<decltype(form.part().m)>;
  for (int64_t i = 0; i < splits; ++i) form.join(form.state_at(static_cast<char*>(states) + i * stride), i == 0);
  form.finish(a.out, static_cast<Acc*>(a.lse));
}

// body(form) with the unit in its form.
template <typename T, typename Keys, typename F>
VEC_INLINE void with_form(const FlashFwd& a, const FlashUnit& u, const Keys& keys, void* scratch, const F& body) {
  if constexpr (kFew<T> > 0) {
    if ((u.end - u.begin) * a.group() <= kFew<T>) {
      Few<T, Keys> form(a, u, keys, scratch);
      return body(form);
    }
  }
  begin_tiles();
  Unit<T, Keys> form(a, u, keys, scratch);
  body(form);
  end_tiles();
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
