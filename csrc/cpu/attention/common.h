// The forward of attention: shared by its two forms, prefill.h for tiles of many lanes and decode.h for tiles of few. A tile is
// some query rows of one sequence with all query heads of a key head's group; a lane is one of these query rows with one of
// these heads.
//
// The arithmetic of a row is the same whatever else is in its tile, however the call is tiled and whichever thread runs it:
//   - The keys of a sequence are cut into splits of kSplit and these into blocks of kBlock, counted from key 0.
//   - A score is one chain over d.
//   - A lane has a running maximum m of scores, sum l of weights, and sum o of weights times values. A block with largest score
//     s updates them: m' = max(m, s), a = exp(m - m'), l' = a l + the block's sum of exp(score - m'), and o likewise.
//   - Splits are joined in rising order, with m = max(m1, m2): (l, o) = exp(m1 - m) (l1, o1) + exp(m2 - m) (l2, o2).
// A masked key has weight 0 and changes nothing, so that blocks without unmasked keys may be left out or not.
#pragma once
#include <cmath>

#include "../../flash_attention.h"
#include "../dispatch.h"
#include "../gemm/pack.h"
#include "../gemm/arena.h"
#include "softmax.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr int64_t kSplit = 4096;  // keys of a split
constexpr int64_t kBlock = 128;   // keys of a block
constexpr int64_t kLanes = 256;   // lanes of a full prefill tile: rows times query heads of a group
// Whether the weighted values of a block of keys get a separate accumulator, which is then added to o. In long sequences
// float32 needs it; the rounding of bfloat16 weights hides what it would gain.
template <typename P> constexpr bool kSeparateBlocks = P::step == 1;
constexpr int64_t kAhead = 32;  // a row of keys or values is prefetched so many rows before it is used

// The keys and values of one sequence, read in place. select(first, n) selects keys [first, first + n), n <= kBlock. In the
// other functions key i is then key first + i. paged_attention.cpp has a class with the same functions for a paged cache.
template <typename T> class DenseKeys {
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
  VEC_INLINE int64_t k_head(int64_t head) const { return head * tensors_.k.head_stride; }  // offset of a head from head 0
  VEC_INLINE int64_t v_head(int64_t head) const { return head * tensors_.v.head_stride; }
  VEC_INLINE float k_scale(int64_t, int64_t) const { return 1; }
  VEC_INLINE float v_scale(int64_t, int64_t) const { return 1; }

 private:
  const T *k_, *v_;
  const Attention& tensors_;
  int64_t first_ = 0;
};

// How a score is computed from the product q . k: it is product * factor, to the base 2 or e of kLogBase (softmax.h). With a
// soft-cap, product is first replaced by cap * tanh(product * inverse).
template <typename Acc> struct Score { Acc factor, cap, inverse; };
template <typename T> VEC_INLINE Score<acc_t<T>> score_of(const Attention& a) {
  using Acc = acc_t<T>;
  if (a.softcap <= 0) return {static_cast<Acc>(a.scale / kLogBase<T>), 0, 0};
  constexpr double most = std::numeric_limits<Acc>::max();
  const double inverse = a.scale / a.softcap;  // bounded, because infinity would make a product of 0 NaN
  return {static_cast<Acc>(1 / kLogBase<T>), static_cast<Acc>(a.softcap), static_cast<Acc>(inverse < most ? inverse : most)};
}

// The partial result of one split, or of all splits so far, for every lane: the maximum m, the sum l of the weights, and the
// sum o of weights times values.
template <typename Acc> struct State {
  Acc *m, *l, *o;
  VEC_INLINE void allocate(Arena& arena, int64_t lanes, int64_t width) {
    arena.take(m, lanes);
    arena.take(l, lanes);
    arena.take(o, lanes * width);
  }
};

// Where the data of lane i of a key head are. Lane i is query row begin + i / group with head i % group of the group.
template <typename T> class LaneMap {
 public:
  LaneMap(const Attention& a, const AttentionTile& tile, int64_t kv_head)
      : a_(a), tile_(tile), group_(a.group()), head_(kv_head * group_), q_(a.offset_q(a.q, tile.sequence, head_)) {}
  VEC_INLINE int64_t count() const { return (tile_.end - tile_.begin) * group_; }
  VEC_INLINE int64_t row(int64_t lane) const { return tile_.begin + lane / group_; }
  VEC_INLINE const T* q(int64_t lane) const { return static_cast<const T*>(a_.q.data) + q_ + offset(a_.q, lane); }
  VEC_INLINE T* out(const AttentionTensor& out, int64_t lane) const {
    return static_cast<T*>(const_cast<void*>(out.data)) + a_.offset_q(out, tile_.sequence, head_) + offset(out, lane);
  }
  VEC_INLINE int64_t lse(int64_t lane) const {
    return a_.offset_lse(tile_.sequence, head_) + lane % group_ * a_.lse_head_stride + row(lane);
  }
  // Sets the unmasked keys [first[lane], last[lane]) of each lane.
  void ranges(int64_t* first, int64_t* last) const {
    for (int64_t lane = 0; lane < count(); ++lane) {
      first[lane] = a_.first_key(tile_.sequence, row(lane));
      last[lane] = a_.last_key(tile_.sequence, row(lane));
    }
  }

 private:
  VEC_INLINE int64_t offset(const AttentionTensor& t, int64_t lane) const {
    return row(lane) * t.token_stride + lane % group_ * t.head_stride;
  }
  const Attention& a_;
  const AttentionTile& tile_;
  const int64_t group_, head_, q_;
};

// Joins m and l of `part` to those of `total`, for a vector of lanes from i on. The caller then joins o as a * total.o + b *
// part.o. `alone`: `part` is the first, and `total` holds nothing yet.
template <typename T, typename V>
VEC_INLINE void join_lanes(const State<acc_t<T>>& total, const State<acc_t<T>>& part, int64_t i, bool alone, V& a, V& b) {
  const V old = alone ? V(static_cast<acc_t<T>>(-kInfinity)) : V::load(total.m + i), one = V::load(part.m + i);
  const V m = max(one, old), shift = finite_shift(m), l = V::load(part.l + i);
  a = exp_of<T>(old - shift);
  b = exp_of<T>(one - shift);
  m.store(total.m + i);
  (alone ? l * b : V::load(total.l + i) * a + l * b).store(total.l + i);
}

template <typename S> VEC_INLINE void prefetch_line(const S* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

template <typename V, typename Acc> VEC_INLINE void fill(Acc* p, int64_t n, double value) {  // in whole vectors
  for (int64_t i = 0; i < n; i += V::size) V(static_cast<Acc>(value)).store(p + i);
}

// Weights are summed in chains of this many keys, counted from key 0, and the chains are added up. In a longer float32 chain,
// the additions of almost equal weights all round in the same direction: with one chain for a block of keys, dv had three times
// the error of PyTorch's. 16-bit results do not show it.
template <typename T> constexpr int64_t kSumChain = sizeof(T) == 2 ? kBlock : 8;

// log_sum_exp: the natural log-sum-exp, -inf for a fully masked row (l = 0). It is computed in double and rounded once, because
// its rounding error becomes a relative error of every weight in the backward. reciprocal: 1 / l, or 0 for a fully masked row.
template <typename T, typename Acc> VEC_INLINE Acc log_sum_exp(Acc m, Acc l) {
  const double natural = static_cast<double>(m) * kLogBase<T> + ::log(static_cast<double>(l));
  return l == 0 ? static_cast<Acc>(-kInfinity) : static_cast<Acc>(natural);
}
template <typename Acc> VEC_INLINE Acc reciprocal(Acc l) { return l == 0 ? Acc(0) : Acc(1) / l; }

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
