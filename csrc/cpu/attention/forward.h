// Computes one tile of attention's forward, with class Decode or Prefill by its number of lanes.
#pragma once
#include "decode.h"
#include "prefill.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

// A tile of at most this many lanes is computed by Decode, a larger one by Prefill. In the AMX build all are computed by
// Prefill: AMX tiles add products in an order of their own, and a decode of one token must give the same bits as a prefill.
template <typename T> constexpr int64_t kMostDecodeLanes = kTiles<matrix_t<T>> ? 0 : kDecodeLanes;

template <typename T> VEC_INLINE AttentionTiling tiling_of(const Attention& a, int64_t longest) {
  const int64_t rows = greater(1, lesser(longest, kLanes / a.group())), lanes = rows * a.group();
  PrefillScratch<T> prefill(lanes, a.d, nullptr);
  DecodeScratch<T> decode(a.kv_heads, lesser(lanes, kMostDecodeLanes<T>), a.d, nullptr);
  Arena prefill_state(nullptr), decode_state(nullptr);
  prefill.part.allocate(prefill_state, prefill.lanes, a.d);
  decode.part.allocate(decode_state, decode.lanes, decode.width);
  return {rows, kSplit, kMostDecodeLanes<T>, greater(prefill.bytes, decode.bytes),
          greater(prefill_state.bytes, decode_state.bytes)};
}

// Computes with `form`, a Decode or Prefill, what AttentionTile (flash_attention.h) says: the whole tile, one of its splits, or
// the join of its splits.
template <typename Form> VEC_INLINE void run_form(Form& form, const FlashFwd& a, const AttentionTile& tile) {
  using Acc = std::remove_pointer_t<decltype(form.part().m)>;
  if (tile.split >= 0) return form.split(tile.split * kSplit, form.state_at(tile.state));
  if (tile.splits > 0) {
    for (int64_t i = 0; i < tile.splits; ++i) {
      form.join(form.state_at(static_cast<char*>(tile.state) + i * tile.state_bytes), i == 0);
    }
  } else {
    const int64_t first = form.first_key(), last = form.last_key();
    if (last <= first) form.clear();
    for (int64_t begin = first / kSplit * kSplit; begin < last; begin += kSplit) {
      form.split(begin, form.part());
      form.join(form.part(), begin <= first);
    }
  }
  form.finish(a.out, static_cast<Acc*>(a.lse));
}

template <typename T, typename Keys>
VEC_INLINE void run_tile(const FlashFwd& a, const AttentionTile& tile, const Keys& keys, void* scratch) {
  if constexpr (kMostDecodeLanes<T> > 0) {
    if ((tile.end - tile.begin) * a.group() <= kMostDecodeLanes<T>) {
      Decode<T, Keys> form(a, tile, keys, scratch);
      return run_form(form, a, tile);
    }
  }
  begin_tiles();
  Prefill<T, Keys> form(a, tile, keys, scratch);
  run_form(form, a, tile);
  end_tiles();
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
