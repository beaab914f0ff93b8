// The forward of attention: what its two forms share (attention_unit.h for many lanes, attention_few.h for few). A unit is
// some query rows of one sequence with all heads of one key head's group; a lane is one row and head of it.
//
// The arithmetic of a row is the same whatever else is in its unit, however the unit is cut and whoever runs it:
//   keys are cut, from key 0 of their sequence, into splits of kSplit and these into blocks of kBlock;
//   a score is one chain over d, or the sum of one for each kChain elements of d, in order;
//   a block's maximum joins the running one, m' = max(m, ...), a = exp(m - m'); the block's weights are summed in a chain over
//   its keys, l = a l + sum, and o is a chain over its keys of weight times value that begins at a o;
//   splits are joined in rising order, (l, o) = exp(m1 - m) (l1, o1) + exp(m2 - m) (l2, o2).
// A key that the mask hides has weight 0 and changes nothing, so that blocks without visible keys may be left out or not.
#pragma once
#include <cmath>
#include <limits>

#include "../flash_attention.h"
#include "dispatch.h"
#include "pack.h"
#include "scratch.h"
#include "softmax.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr int64_t kSplit = 4096, kBlock = 128, kLanes = 256;  // kLanes: of a full unit
// Long chains of float32 are the largest error of a score; those of bfloat16 pairs are lost in the products'.
// Whether weighted values of a block of keys are summed by themselves and then joined: float32 needs it in long sequences,
// where bfloat16's own rounding hides it.
template <typename P> constexpr bool kApart = P::step == 1;
template <typename P> constexpr int64_t kChain = P::step == 1 ? 32 : 256;
constexpr int64_t kAhead = 32;  // how many rows before its use a row of a cache is asked for

// Keys and values of one sequence. select(first, n) turns to keys [first, first + n), n <= kBlock; the rows and scales that
// follow count from there.
template <typename T> class DenseKeys {  // read in place
 public:
  using Stored = T;
  static constexpr bool scaled = false;
  DenseKeys(const Attention& a, int64_t sequence)
      : k_(static_cast<const T*>(a.k.data) + a.offset_k(a.k, sequence, 0)),
        v_(static_cast<const T*>(a.v.data) + a.offset_k(a.v, sequence, 0)), tensors_(a) {}
  VEC_INLINE void select(int64_t first, int64_t) { first_ = first; }
  VEC_INLINE const T* k_row(int64_t i, int64_t head) const {
    return k_ + (first_ + i) * tensors_.k.token_stride + k_head(head);
  }
  VEC_INLINE const T* v_row(int64_t i, int64_t head) const {
    return v_ + (first_ + i) * tensors_.v.token_stride + v_head(head);
  }
  VEC_INLINE int64_t k_head(int64_t head) const { return head * tensors_.k.head_stride; }  // from head 0 to another
  VEC_INLINE int64_t v_head(int64_t head) const { return head * tensors_.v.head_stride; }
  VEC_INLINE float k_scale(int64_t, int64_t) const { return 1; }
  VEC_INLINE float v_scale(int64_t, int64_t) const { return 1; }

 private:
  const T *k_, *v_;
  const Attention& tensors_;
  int64_t first_ = 0;
};

// What turns products into scores: product * factor, to the base of kBase2; before it, where softcap > 0, product becomes
// cap * tanh(product * inverse).
template <typename Acc> struct Score { Acc factor, cap, inverse; };
template <typename T> VEC_INLINE Score<acc_t<T>> score_of(const Attention& a) {
  using Acc = acc_t<T>;
  if (a.softcap <= 0) return {static_cast<Acc>(a.scale / kLogBase<T>), 0, 0};
  constexpr double most = std::numeric_limits<Acc>::max();
  const double inverse = a.scale / a.softcap;  // an infinite one would make a score of 0 NaN
  return {static_cast<Acc>(1 / kLogBase<T>), static_cast<Acc>(a.softcap), static_cast<Acc>(inverse < most ? inverse : most)};
}

// The unfinished result of one split, or of those so far: maximum and sum of every lane, and its weighted values.
template <typename Acc> struct State {
  Acc *m, *l, *o;
  VEC_INLINE void carve(Carver& carver, int64_t lanes, int64_t width) {
    carver.take(m, lanes);
    carver.take(l, lanes);
    carver.take(o, lanes * width);
  }
};

// Lane i of a key head: query row begin + i / group, head i % group of the group.
template <typename T> class LaneMap {
 public:
  LaneMap(const Attention& a, const FlashUnit& u, int64_t kv_head)
      : a_(a), u_(u), group_(a.group()), head_(kv_head * group_), q_(a.offset_q(a.q, u.sequence, head_)) {}
  VEC_INLINE int64_t count() const { return (u_.end - u_.begin) * group_; }
  VEC_INLINE int64_t row(int64_t lane) const { return u_.begin + lane / group_; }
  VEC_INLINE const T* q(int64_t lane) const { return static_cast<const T*>(a_.q.data) + q_ + offset(a_.q, lane); }
  VEC_INLINE T* out(const AttentionTensor& out, int64_t lane) const {
    return static_cast<T*>(const_cast<void*>(out.data)) + a_.offset_q(out, u_.sequence, head_) + offset(out, lane);
  }
  VEC_INLINE int64_t lse(int64_t lane) const {
    return a_.offset_lse(u_.sequence, head_) + lane % group_ * a_.lse_head_stride + row(lane);
  }
  // Keys that each lane may see: [first, last).
  void ranges(int64_t* first, int64_t* last) const {
    for (int64_t lane = 0; lane < count(); ++lane) {
      first[lane] = a_.first_key(u_.sequence, row(lane));
      last[lane] = a_.last_key(u_.sequence, row(lane));
    }
  }

 private:
  VEC_INLINE int64_t offset(const AttentionTensor& t, int64_t lane) const {
    return row(lane) * t.token_stride + lane % group_ * t.head_stride;
  }
  const Attention& a_;
  const FlashUnit& u_;
  const int64_t group_, head_, q_;
};

// Joins lanes' maxima and sums: what the old and the new values are multiplied with. `alone`: there is nothing old.
template <typename T, typename V> VEC_INLINE void join_lanes(const State<acc_t<T>>& total, const State<acc_t<T>>& part,
                                                             int64_t i, bool alone, V& a, V& b) {
  const V old = alone ? V(static_cast<acc_t<T>>(-kInfinity)) : V::load(total.m + i), one = V::load(part.m + i);
  const V m = max(one, old), shift = finite_shift(m), l = V::load(part.l + i);
  a = exp_of<T>(old - shift);
  b = exp_of<T>(one - shift);
  m.store(total.m + i);
  (alone ? l * b : V::load(total.l + i) * a + l * b).store(total.l + i);
}

template <typename S> VEC_INLINE void ask_for(const S* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

template <typename V, typename Acc> VEC_INLINE void fill(Acc* p, int64_t n, double value) {  // whole vectors
  for (int64_t i = 0; i < n; i += V::size) V(static_cast<Acc>(value)).store(p + i);
}

// Weights are added in chains of this many keys, counted from the sequence's first, then chain by chain: weights that are
// almost equal are all rounded the same way, and a chain of 128 of them was 4 units of float32 off. 16 bits show none of it.
template <typename T> constexpr int64_t kSumChain = sizeof(T) == 2 ? kBlock : 8;

// Natural log-sum-exp, and 1 / l; -inf and 0 for a row that saw no key.
template <typename T, typename Acc> VEC_INLINE Acc log_sum_exp(Acc m, Acc l) {
  // In double: the backward's weights take what is rounded here as a relative error, so it is rounded once.
  const double natural = static_cast<double>(m) * kLogBase<T> + ::log(static_cast<double>(l));
  return l == 0 ? static_cast<Acc>(-kInfinity) : static_cast<Acc>(natural);
}
template <typename Acc> VEC_INLINE Acc reciprocal(Acc l) { return l == 0 ? Acc(0) : Acc(1) / l; }

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
