// Built for: avx2 avx512 avx512_bf16 amx
#include "../../paged_attention.h"

#include "forward.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

// The keys and values of one sequence in a paged cache, of storage type S for queries of type T.
template <typename T, typename S> class PagedKeys {
 public:
  using Stored = S;
  using Acc = acc_t<T>;
  static constexpr bool scaled = std::is_same_v<S, int8_t>;

  PagedKeys(const PagedFwd& a, int64_t sequence)
      : k_(static_cast<const S*>(a.k_cache)), v_(static_cast<const S*>(a.v_cache)), k_scale_(a.k_scale), v_scale_(a.v_scale),
        table_(a.block_table + sequence * a.max_blocks), size_(a.block_size), heads_(a.kv_heads), d_(a.d),
        first_unmasked_(a.first_key(sequence, 0)) {}

  // Entries of the block table for keys before the first unmasked one may be invalid (a window has passed them). In place of
  // these keys the first unmasked key is read; the mask gives it weight 0 there.
  VEC_INLINE void select(int64_t first, int64_t n) {
    const int64_t key = greater(first, first_unmasked_);
    int64_t i = 0, block = key / size_, inside = key % size_, at = (table_[block] * size_ + inside) * heads_;
    for (; i < key - first; ++i) at_[i] = at;
    for (; i < n; ++i, ++inside, at += heads_) {
      if (inside == size_) {
        inside = 0;
        at = table_[++block] * size_ * heads_;
      }
      at_[i] = at;
    }
  }
  VEC_INLINE const S* k_row(int64_t i, int64_t head) const { return k_ + (at_[i] + head) * d_; }
  VEC_INLINE const S* v_row(int64_t i, int64_t head) const { return v_ + (at_[i] + head) * d_; }
  VEC_INLINE int64_t k_head(int64_t head) const { return head * d_; }
  VEC_INLINE int64_t v_head(int64_t head) const { return head * d_; }
  VEC_INLINE Acc k_scale(int64_t i, int64_t head) const { return factor(k_scale_[at_[i] + head]); }
  VEC_INLINE Acc v_scale(int64_t i, int64_t head) const { return factor(v_scale_[at_[i] + head]); }

 private:
  static VEC_INLINE Acc factor(float scale) { return scale == 0 ? Acc(1) : static_cast<Acc>(scale); }
  const S *k_, *v_;
  const float *k_scale_, *v_scale_;
  const int32_t* table_;
  const int64_t size_, heads_, d_, first_unmasked_;
  int64_t at_[kBlock];
};

}  // namespace

AttentionTiling paged_attention_fwd_tiling(const PagedFwd& a, int64_t longest) {
  WITH_STORAGE(a.dtype, T, { return tiling_of<T>(a, longest); })
  return {};
}

void paged_attention_fwd(const PagedFwd& a, const AttentionTile& tile, void* scratch) {
  WITH_STORAGE(a.dtype, T, {
    if (a.k_scale != nullptr) run_tile<T>(a, tile, PagedKeys<T, int8_t>(a, tile.sequence), scratch);
    else run_tile<T>(a, tile, PagedKeys<T, T>(a, tile.sequence), scratch);
  })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
