#include "../paged_attention.h"

#include "attention_forward.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

// Keys and values of one sequence and key head behind its block table, of storage type S for queries of type T. The
// positions, and scales, of at most kBlock keys are looked up at once; what the last vector has beyond them counts as 1.
template <typename T, typename S> class PagedKeys {
 public:
  using Stored = S;
  using Acc = acc_t<T>;
  static constexpr bool scaled = std::is_same_v<S, int8_t>;

  PagedKeys(const PagedFwd& a, int64_t sequence, int64_t head)
      : k_(static_cast<const S*>(a.k_cache) + head * a.d), v_(static_cast<const S*>(a.v_cache) + head * a.d),
        k_scale_(a.k_scale + (scaled ? head : 0)), v_scale_(a.v_scale + (scaled ? head : 0)),
        table_(a.block_table + sequence * a.max_blocks), size_(a.block_size), heads_(a.kv_heads), d_(a.d) {}

  VEC_INLINE void select(int64_t first, int64_t n) {
    int64_t block = first / size_, inside = first % size_, at = (table_[block] * size_ + inside) * heads_;
    for (int64_t i = 0; i < n; ++i, ++inside, at += heads_) {
      if (inside == size_) {
        inside = 0;
        at = table_[++block] * size_ * heads_;
      }
      at_[i] = at;
      if constexpr (scaled) {
        const float k = k_scale_[at], v = v_scale_[at];
        k_scales_[i] = k == 0 ? Acc(1) : static_cast<Acc>(k);
        v_scales_[i] = v == 0 ? Acc(1) : static_cast<Acc>(v);
      }
    }
    if constexpr (scaled) {
      for (int64_t i = n; i < round_up(n, Vec<Acc>::size); ++i) k_scales_[i] = v_scales_[i] = 1;
    }
  }
  VEC_INLINE const S* k_row(int64_t i) const { return k_ + at_[i] * d_; }
  VEC_INLINE const S* v_row(int64_t i) const { return v_ + at_[i] * d_; }
  VEC_INLINE Acc k_scale(int64_t i) const { return k_scales_[i]; }
  VEC_INLINE Acc v_scale(int64_t i) const { return v_scales_[i]; }
  template <typename V> VEC_INLINE V k_scales(int64_t i) const { return V::load(k_scales_ + i); }
  template <typename V> VEC_INLINE V v_scales(int64_t i) const { return V::load(v_scales_ + i); }

 private:
  const S *k_, *v_;
  const float *k_scale_, *v_scale_;
  const int32_t* table_;
  const int64_t size_, heads_, d_;
  int64_t at_[kBlock];
  Acc k_scales_[scaled ? kBlock : 1], v_scales_[scaled ? kBlock : 1];
};

template <typename T, typename F>
VEC_INLINE void with_keys(const PagedFwd& a, const FlashUnit& u, void* scratch, const F& body) {
  if (a.k_scale != nullptr) {
    const PagedKeys<T, int8_t> keys(a, u.sequence, u.kv_head);
    with_form<T>(a, u, keys, scratch, body);
  } else {
    const PagedKeys<T, T> keys(a, u.sequence, u.kv_head);
    with_form<T>(a, u, keys, scratch, body);
  }
}

}  // namespace

FlashPlan paged_attention_fwd_plan(const PagedFwd& a, int64_t longest) {
  WITH_STORAGE(a.dtype, T, { return plan_of<T>(a, longest); })
  return {};
}

void paged_attention_fwd(const PagedFwd& a, const FlashUnit& unit, void* scratch) {
  WITH_STORAGE(a.dtype, T, { with_keys<T>(a, unit, scratch, [&](auto& form) VEC_LAMBDA { run_unit(form, a, unit); }); })
}

void paged_attention_fwd_join(const PagedFwd& a, const FlashUnit& unit, void* states, int64_t stride, int64_t splits,
                              void* scratch) {
  WITH_STORAGE(a.dtype, T, {
    with_keys<T>(a, unit, scratch, [&](auto& form) VEC_LAMBDA { join_unit(form, a, states, stride, splits); });
  })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
