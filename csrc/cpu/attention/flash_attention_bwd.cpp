// Built for: avx2 avx512 avx512_bf16 amx
#include "../../flash_attention_bwd.h"

#include "backward.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

// shift and delta of a block of queries, and dq = 0 for the fully masked ones, which no other code reads or writes.
template <typename T> void prepare(const FlashBwd& a, const BwdTile& tile) {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  const int64_t sq = a.length_q(tile.sequence), r0 = tile.block * kBwdQueries, r1 = lesser(r0 + kBwdQueries, sq);
  const int64_t at = a.offset_lse(tile.sequence, tile.head), d = a.d;
  const T* dout = static_cast<const T*>(a.dout.data) + a.offset_q(a.dout, tile.sequence, tile.head);
  const T* out = static_cast<const T*>(a.out.data) + a.offset_q(a.out, tile.sequence, tile.head);
  const int64_t first_unmasked = clip(a.fully_masked_rows(tile.sequence), r0, r1);
  const int64_t token = a.cu_q ? a.cu_q[tile.sequence] : tile.sequence * a.seqlen_q;
  for (int64_t r = r0; r < first_unmasked; ++r) {
    std::memset(static_cast<T*>(a.dq) + ((token + r) * a.heads + tile.head) * d, 0, static_cast<size_t>(d) * sizeof(T));
  }
  for (int64_t r = first_unmasked; r < r1; ++r) {
    Two<V> sum{};
    for_vectors<V, T>(d, [&](int64_t j, auto part) VEC_LAMBDA {
      add_to(sum, load<V>(dout + r * a.dout.token_stride + j, part), load<V>(out + r * a.out.token_stride + j, part));
    });
    const Acc lse = static_cast<const Acc*>(a.lse)[at + r];
    const Acc dlse = a.dlse ? static_cast<const Acc*>(a.dlse)[at + r] : Acc(0);
    static_cast<Acc*>(a.delta)[at + r] = (sum.a + sum.b).sum() - dlse;
    static_cast<Acc*>(a.shift)[at + r] =
        lse == Acc(-kInfinity) ? Acc(kInfinity) : lse * static_cast<Acc>(1 / kLogBase<T>);
  }
}

}  // namespace

int64_t flash_attention_bwd_columns(const Attention& a) {
  WITH_STORAGE(a.dtype, T, { return Bwd<T>::columns_of(a); })
  return 0;
}

int64_t flash_attention_bwd_scratch(const Attention& a) {
  WITH_STORAGE(a.dtype, T, { return typename Bwd<T>::Scratch().allocate(nullptr, a.d, Bwd<T>::columns_of(a)); })
  return 0;
}

void flash_attention_bwd_prepare(const FlashBwd& a, const BwdTile& tile) {
  WITH_STORAGE(a.dtype, T, { prepare<T>(a, tile); })
}

void flash_attention_bwd(const FlashBwd& a, const BwdTile& tile, void* scratch) {
  begin_tiles();
  WITH_STORAGE(a.dtype, T, { Bwd<T>(a, tile, scratch).run(); })
  end_tiles();
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
