// Attention of a tile with many lanes (prefill). Lanes stand in panels of kPanel. Scores are transposed, [keys][lanes], so that
// maxima, exponentials and sums run along the keys without a reduction across the lanes of a vector, and the weights are an
// operand of the second product as they are. The keys and values of a block are packed once for all panels.
#pragma once
#include "common.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

template <typename T> struct PrefillScratch {
  using P = matrix_t<T>;
  using Acc = typename P::Acc;
  using Element = typename P::Element;
  int64_t lanes, d_steps, v_stride, bytes;
  Element *q, *k, *v, *p;
  Acc* s;                     // [kBlock][kPanel]
  State<Acc> part, total;     // m, l: [lanes], o: [panels][d][kPanel]
  Acc *factor, *low, *high;   // [kPanel]
  int64_t *first, *last;      // [lanes]: the unmasked keys of a lane

  PrefillScratch(int64_t count, int64_t d, void* memory) {
    Arena arena(memory);
    lanes = round_up(count, kPanel<P>);
    d_steps = round_up(d, P::depth) / P::step;
    // The stride between rows of V, or with AMX tiles between rows of V transposed. It is no power of two, so that rows fall
    // into different sets of the cache.
    v_stride = kTiles<P> ? kBlock / P::step + 16 : d + 16;
    arena.take(q, lanes * d_steps);
    arena.take(k, kBlock * d_steps);
    arena.take(v, (kTiles<P> ? round_up(d, 16) : kBlock / P::step) * v_stride);
    arena.take(s, kBlock * kPanel<P>);
    if constexpr (P::step == 1) p = s;
    else arena.take(p, kBlock / P::step * kPanel<P>);
    part.allocate(arena, lanes, d);
    total.allocate(arena, lanes, d);
    arena.take(factor, kPanel<P>);
    arena.take(low, kPanel<P>);
    arena.take(high, kPanel<P>);
    arena.take(first, lanes);
    arena.take(last, lanes);
    bytes = arena.bytes;
  }
};

template <typename T, typename Keys> class Prefill {
 public:
  using P = matrix_t<T>;
  using Acc = typename P::Acc;
  using V = Vec<Acc>;
  using Element = typename P::Element;
  static constexpr int64_t panel = kPanel<P>;

  Prefill(const Attention& a, const AttentionTile& tile, const Keys& keys, void* scratch)
      : keys_(keys), score_(score_of<T>(a)), map_(a, tile, tile.kv_head), head_(tile.kv_head), d_(a.d), lanes_(map_.count()),
        w_(lanes_, a.d, scratch) {
    map_.ranges(w_.first, w_.last);
    for (int64_t from = 0; from < lanes_; from += panel) {
      pack_lanes<P>(count(from), d_, [&](int64_t i) VEC_LAMBDA { return map_.q(from + i); }, w_.q + from * w_.d_steps, panel);
    }
  }

  int64_t first_key() const { return w_.first[0]; }
  int64_t last_key() const { return w_.last[lanes_ - 1]; }
  const State<Acc>& part() const { return w_.part; }
  State<Acc> state_at(void* memory) const {
    State<Acc> state;
    Arena arena(memory);
    state.allocate(arena, w_.lanes, d_);
    return state;
  }

  void clear() {
    fill<V>(w_.total.m, lanes_, -kInfinity);
    fill<V>(w_.total.l, lanes_, 0);
    fill<V>(w_.total.o, w_.lanes * d_, 0);
  }

  // Computes the partial result `part` of the split that begins at key `begin`, for every panel.
  void split(int64_t begin, const State<Acc>& part) {
    const int64_t first = greater(begin, first_key()), last = lesser(begin + kSplit, last_key());
    fill<V>(part.m, lanes_, -kInfinity);
    fill<V>(part.l, lanes_, 0);
    for (int64_t from = 0; from < lanes_; from += panel) {
      const int64_t end = from + count(from) - 1;
      if (lesser(last, w_.last[end]) <= greater(first, w_.first[from])) fill<V>(part.o + from * d_, panel * d_, 0);
    }
    for (int64_t key = begin + (first - begin) / kBlock * kBlock; key < last; key += kBlock) {
      const int64_t low = greater(first, key) / P::depth * P::depth, high = lesser(key + kBlock, last);
      keys_.select(low, high - low);
      pack_rows<P>(high - low, d_, [&](int64_t i) VEC_LAMBDA { return keys_.k_row(i, head_); }, w_.k, w_.d_steps);
      const auto v_row = [&](int64_t i) VEC_LAMBDA { return keys_.v_row(i, head_); };
      if constexpr (kTiles<P>) pack_steps_transposed<P>(high - low, d_, v_row, w_.v, w_.v_stride);
      else pack_steps<P>(high - low, d_, v_row, w_.v, w_.v_stride);
      for (int64_t from = 0; from < lanes_; from += panel) {
        const int64_t end = from + count(from) - 1;
        const int64_t begin_key = greater(low, w_.first[from] / P::depth * P::depth), end_key = lesser(high, w_.last[end]);
        if (begin_key >= end_key) continue;
        const bool opens = greater(begin, w_.first[from]) >= key;  // the panel's first block of this split
        const bool masked = w_.first[end] > begin_key || w_.last[from] < end_key;
        block(part, from, begin_key, end_key, begin_key - low, opens, masked);
      }
    }
  }

  // Joins the partial result of a split to the total. `alone`: the split is the first, and the total holds nothing yet.
  void join(const State<Acc>& part, bool alone) {
    for (int64_t from = 0; from < lanes_; from += panel) {
      for (int64_t i = from; i < from + width(from); i += V::size) {
        V a, b;
        join_lanes<T>(w_.total, part, i, alone, a, b);
        Acc *total = w_.total.o + from * d_ + (i - from), *o = part.o + from * d_ + (i - from);
        for (int64_t e = 0; e < d_ * panel; e += panel) {
          const V one = V::load(o + e) * b;
          (alone ? one : V::load(total + e) * a + one).store(total + e);
        }
      }
    }
  }

  void finish(const AttentionTensor& out, Acc* lse) {
    for (int64_t from = 0; from < lanes_; from += panel) {
      for (int64_t i = 0; i < count(from); ++i) {
        const Acc l = w_.total.l[from + i];
        w_.factor[i] = reciprocal(l);
        if (l == 0) clear_lane(from, i);
        lse[map_.lse(from + i)] = log_sum_exp<T>(w_.total.m[from + i], l);
      }
      unpack_lanes<Acc>(count(from), d_, w_.total.o + from * d_, panel, w_.factor,
                        [&](int64_t i) VEC_LAMBDA { return map_.out(out, from + i); });
    }
  }

 private:
  VEC_INLINE int64_t count(int64_t from) const { return lesser(panel, lanes_ - from); }
  VEC_INLINE int64_t width(int64_t from) const { return round_up(count(from), V::size); }

  void clear_lane(int64_t from, int64_t i) {  // of a fully masked row, where 0 * NaN of another lane's value may stand
    for (int64_t e = 0; e < d_; ++e) w_.total.o[from * d_ + e * panel + i] = 0;
  }

  // Adds keys [key, end) to `part` for the panel of lanes that begins at lane `from`. The keys begin at index `at` of the
  // packed keys and values. `opens`: they are the first of the split for this panel.
  void block(const State<Acc>& part, int64_t from, int64_t key, int64_t end, int64_t at, bool opens, bool masked) {
    const int64_t n = end - key, wide = width(from), size = sizeof(Element);
    product<P, Start::zero>({w_.k + at * w_.d_steps, w_.d_steps * size, size, w_.q + from * w_.d_steps, panel, 0, w_.s, panel,
                             n, w_.d_steps, 0, wide});
    if (masked) {
      for (int64_t i = 0; i < wide; ++i) {  // lanes past the last one get the limits of the last
        const int64_t lane = lesser(from + i, lanes_ - 1);
        w_.low[i] = static_cast<Acc>(greater(w_.first[lane] - key, 0));
        w_.high[i] = static_cast<Acc>(lesser(w_.last[lane] - key, n));
      }
    }
    if (masked) scores<true>(wide, n, at);
    else if (Keys::scaled || score_.cap > 0) scores<false>(wide, n, at);
    weights(part, from, wide, n, at, key);
    const int64_t steps = round_up(n, P::depth) / P::step;
    ProductArgs<P> pv{w_.v + at / P::step * w_.v_stride, size, w_.v_stride * size, w_.p, panel, 0, part.o + from * d_, panel,
                      d_, steps, 0, wide, w_.factor};
    if constexpr (kTiles<P>) {
      pv.a = w_.v + at / P::step;
      pv.a_row_bytes = w_.v_stride * size;
      pv.a_step_bytes = size;
      for (int64_t j = (n + 1) / P::step; j < steps; ++j) fill<V>(as_acc<P>(w_.p + j * panel), wide, 0);
    }
    if (opens) product<P, Start::zero>(pv);
    else product<P, kSeparateBlocks<P> ? Start::separate_scaled : Start::scaled>(pv);
  }

  // Turns the products q . k in w_.s into scores: applies the scales of the keys, the soft-cap and the mask.
  template <bool masked> void scores(int64_t wide, int64_t n, int64_t at) {
    const V cap(score_.cap), inverse(score_.inverse);
    for (int64_t i = 0; i < wide; i += V::size) {
      V low, high;
      if constexpr (masked) low = V::load(w_.low + i), high = V::load(w_.high + i);
      for (int64_t j = 0; j < n; ++j) {
        V s = V::load(w_.s + j * panel + i);
        if constexpr (Keys::scaled) s = s * V(static_cast<Acc>(keys_.k_scale(at + j, head_)));
        if (score_.cap > 0) s = cap * tanh(s * inverse);
        if constexpr (masked) s = within(s, V(static_cast<Acc>(j)), low, high);
        s.store(w_.s + j * panel + i);
      }
    }
  }

  // Updates the running maximum and sum of each lane, and computes w_.factor, with which o must be multiplied, and the weights.
  void weights(const State<Acc>& part, int64_t from, int64_t wide, int64_t n, int64_t at, int64_t key) {
    const V factor(score_.factor);
    for (int64_t i = 0; i < wide; i += V::size) {
      const Acc* s = w_.s + i;
      V top[4];
      for (V& t : top) t = V(static_cast<Acc>(-kInfinity));
      int64_t j = 0;
      for (; j + 4 <= n; j += 4) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) top[u] = max(V::load(s + (j + u) * panel), top[u]);
      }
      for (; j < n; ++j) top[0] = max(V::load(s + j * panel), top[0]);
      const V old = V::load(part.m + from + i);
      const V m = max(max(max(top[0], top[1]), max(top[2], top[3])) * factor, old), shift = finite_shift(m);
      const V scale = exp_of<T>(old - shift);
      m.store(part.m + from + i);
      scale.store(w_.factor + i);
      const V sum = exponentials(s, w_.p + i, shift, n, at, key);
      fma(scale, V::load(part.l + from + i), sum).store(part.l + from + i);
    }
  }

  // Turns scores into weights and stores them as operands. score * factor is rounded before the shift is subtracted (no fma),
  // because the maximum was rounded in the same way: so the largest weight is exactly 1.
  VEC_INLINE V exponentials(const Acc* s, Element* p, V shift, int64_t n, int64_t at, int64_t key) {
    const V factor(score_.factor);
    const auto weight = [&](int64_t j) VEC_LAMBDA { return exp_of<T>(V::load(s + j * panel) * factor - shift); };
    const auto scaled = [&](V x, int64_t j) VEC_LAMBDA {
      if constexpr (Keys::scaled) return x * V(static_cast<Acc>(keys_.v_scale(at + j, head_)));
      else return x;
    };
    V sum(0);
    if constexpr (P::step == 2) {
      int64_t j = 0;
      for (; j + 2 <= n; j += 2) {
        const V x = weight(j), y = weight(j + 1);
        sum = sum + x + y;
        store_pairs(p + j / 2 * panel, scaled(x, j), scaled(y, j + 1));
      }
      if (j < n) {
        const V x = weight(j);
        sum = sum + x;
        store_pairs(p + j / 2 * panel, scaled(x, j), V(0));
      }
    } else {
      for (int64_t j = 0; j < n;) {
        V chain(0);
        for (const int64_t end = lesser(n, j + kSumChain<T> - (key + j) % kSumChain<T>); j < end; ++j) {
          const V x = weight(j);
          chain = chain + x;
          scaled(x, j).store(p + j * panel);
        }
        sum = sum + chain;
      }
    }
    return sum;
  }

  Keys keys_;
  const Score<Acc> score_;
  const LaneMap<T> map_;
  const int64_t head_, d_, lanes_;
  PrefillScratch<T> w_;
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
