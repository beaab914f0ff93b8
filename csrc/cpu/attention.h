// The forward of attention for one unit: some query rows of one sequence with all heads of one key head's group. The rows
// times heads of a unit are lanes, in panels of kPanel; scores stand transposed, [keys][lanes], so that maxima, exponentials
// and sums run down the keys with no reduction across lanes, and weights are the second product's operand as they are.
//
// The arithmetic of a row is the same whatever else is in its unit, however the unit is cut and whoever runs it:
//   keys are cut, from key 0 of their sequence, into splits of kSplit and these into blocks of kBlock;
//   a score is one chain over d; a block's maximum m' joins the running one, a = exp(m - m'), the block's weights are summed
//   in a chain over its keys, l = a l + sum, and o = a o + one chain over its keys of weight times value;
//   splits are joined in rising order, (l, o) = exp(m1 - m) (l1, o1) + exp(m2 - m) (l2, o2).
// A key that the mask hides has weight 0 and changes nothing, so that blocks without visible keys may be left out or not.
#pragma once
#include <cmath>

#include "../flash_attention.h"
#include "dispatch.h"
#include "pack.h"
#include "softmax.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr int64_t kSplit = 4096, kBlock = 128, kLanes = 256;  // kLanes: of a full unit

VEC_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
VEC_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
VEC_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Keys and values of one sequence and key head, read in place.
template <typename T> struct DenseKeys {
  using Storage = T;
  static constexpr bool scaled = false;
  const T *k, *v;
  int64_t k_stride, v_stride, begin;
  VEC_INLINE void select(int64_t first, int64_t) { begin = first; }
  VEC_INLINE const T* k_row(int64_t i) const { return k + (begin + i) * k_stride; }
  VEC_INLINE const T* v_row(int64_t i) const { return v + (begin + i) * v_stride; }
  VEC_INLINE float k_scale(int64_t) const { return 1; }
  VEC_INLINE float v_scale(int64_t) const { return 1; }
};

// Where a thread keeps a unit; every part begins on a cache line.
template <typename T> struct UnitScratch {
  using P = matrix_t<T>;
  using Acc = typename P::Acc;
  using Element = typename P::Element;
  int64_t d_steps, v_stride;
  Element *q, *k, *v, *p;
  Acc *s, *o, *total_o;             // [kBlock][kPanel], [panels][d][kPanel] twice
  Acc *m, *l, *total_m, *total_l;   // [lanes]
  Acc *factor, *low, *high;         // [kPanel]
  int64_t *first, *last;            // [lanes]: keys that a lane may see
  int64_t bytes = 0;

  UnitScratch(int64_t lanes, int64_t d, void* memory) {
    const int64_t padded = round_up(lanes, kPanel<P>);
    d_steps = d / P::step;
    v_stride = d + 16;  // not a power of two: consecutive steps fall into different sets of the cache
    take(memory, q, padded * d_steps);
    take(memory, k, kBlock * d_steps);
    take(memory, v, kBlock / P::step * v_stride);
    take(memory, s, kBlock * kPanel<P>);
    if constexpr (P::step == 1) p = s;
    else take(memory, p, kBlock / P::step * kPanel<P>);
    take(memory, o, padded * d);
    take(memory, total_o, padded * d);
    take(memory, m, padded);
    take(memory, l, padded);
    take(memory, total_m, padded);
    take(memory, total_l, padded);
    take(memory, factor, kPanel<P>);
    take(memory, low, kPanel<P>);
    take(memory, high, kPanel<P>);
    take(memory, first, padded);
    take(memory, last, padded);
  }

 private:
  template <typename U> VEC_INLINE void take(void* memory, U*& part, int64_t count) {
    part = memory == nullptr ? nullptr : reinterpret_cast<U*>(static_cast<char*>(memory) + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(U)), 64);
  }
};

// What turns products into scores: product * factor, to the base of kBase2; before it, where softcap > 0, product becomes
// cap * tanh(product * inverse).
template <typename Acc> struct Score { Acc factor, cap, inverse; };
template <typename T> VEC_INLINE Score<acc_t<T>> score_of(const Attention& a) {
  using Acc = acc_t<T>;
  if (a.softcap <= 0) return {static_cast<Acc>(a.scale / kLogBase<T>), 0, 0};
  return {static_cast<Acc>(1 / kLogBase<T>), static_cast<Acc>(a.softcap), static_cast<Acc>(a.scale / a.softcap)};
}

template <typename T, typename Keys> class Unit {
 public:
  using P = matrix_t<T>;
  using Acc = typename P::Acc;
  using V = Vec<Acc>;
  using Element = typename P::Element;
  static constexpr int64_t panel = kPanel<P>;

  Unit(const Attention& a, const FlashUnit& u, const Keys& keys, void* scratch)
      : a_(a), u_(u), keys_(keys), score_(score_of<T>(a)), lanes_((u.end - u.begin) * a.group()), w_(lanes_, a.d, scratch) {}

  // Queries into lanes; which keys each lane may see.
  void prepare() {
    const int64_t group = a_.group();
    const T* base = static_cast<const T*>(a_.q.data) + a_.offset_q(a_.q, u_.sequence, u_.kv_head * group);
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      const int64_t row = u_.begin + lane / group;
      w_.first[lane] = a_.first_key(u_.sequence, row);
      w_.last[lane] = a_.last_key(u_.sequence, row);
    }
    for (int64_t from = 0; from < lanes_; from += panel) {
      const auto row = [&](int64_t i) VEC_LAMBDA {
        const int64_t lane = from + i;
        return base + (u_.begin + lane / group) * a_.q.token_stride + lane % group * a_.q.head_stride;
      };
      pack_lanes<P>(count(from), a_.d, row, w_.q + from * w_.d_steps, panel);
    }
    fill(w_.total_m, lanes_, -kInfinity);
  }

  // All splits that the unit's rows see, joined in order.
  void run() {
    const int64_t first = w_.first[0], last = w_.last[lanes_ - 1];
    for (int64_t begin = first / kSplit * kSplit; begin < last; begin += kSplit) {
      split(begin);
      join(begin <= first);
    }
    if (last <= first) clear();
  }

  void finish(const AttentionTensor& out, void* lse) {
    const int64_t group = a_.group();
    T* base = static_cast<T*>(const_cast<void*>(out.data)) + a_.offset_q(out, u_.sequence, u_.kv_head * group);
    Acc* to = static_cast<Acc*>(lse) + a_.offset_lse(u_.sequence, u_.kv_head * group);
    for (int64_t from = 0; from < lanes_; from += panel) {
      for (int64_t i = 0; i < count(from); ++i) {
        const int64_t lane = from + i;
        const Acc l = w_.total_l[lane];
        w_.factor[i] = l == 0 ? Acc(0) : Acc(1) / l;
        to[lane % group * a_.lse_head_stride + u_.begin + lane / group] =
            l == 0 ? Acc(-kInfinity) : static_cast<Acc>(w_.total_m[lane] * Acc(kLogBase<T>) + std::log(l));
      }
      const auto row = [&](int64_t i) VEC_LAMBDA {
        const int64_t lane = from + i;
        return base + (u_.begin + lane / group) * out.token_stride + lane % group * out.head_stride;
      };
      unpack_lanes<Acc>(count(from), a_.d, w_.total_o + from * a_.d, panel, w_.factor, row);
    }
  }

 private:
  VEC_INLINE int64_t count(int64_t from) const { return lesser(panel, lanes_ - from); }
  VEC_INLINE int64_t width(int64_t from) const { return round_up(count(from), V::size); }
  static VEC_INLINE void fill(Acc* p, int64_t n, double value) {
    for (int64_t i = 0; i < n; i += V::size) V(static_cast<Acc>(value)).store(p + i);
  }

  void clear() {
    fill(w_.total_l, lanes_, 0);
    fill(w_.total_o, round_up(lanes_, panel) * a_.d, 0);
  }

  // One split's m, l, o of every panel.
  void split(int64_t begin) {
    const int64_t first = greater(begin, w_.first[0]), last = lesser(begin + kSplit, w_.last[lanes_ - 1]);
    fill(w_.m, lanes_, -kInfinity);
    fill(w_.l, lanes_, 0);
    for (int64_t from = 0; from < lanes_; from += panel) {
      const int64_t end = from + count(from) - 1;
      if (lesser(last, w_.last[end]) <= greater(first, w_.first[from])) fill(w_.o + from * a_.d, panel * a_.d, 0);
    }
    for (int64_t key = begin + (first - begin) / kBlock * kBlock; key < last; key += kBlock) {
      const int64_t low = greater(first, key) / P::step * P::step, high = lesser(key + kBlock, last);
      keys_.select(low, high - low);
      pack_rows<P>(high - low, a_.d, [&](int64_t i) VEC_LAMBDA { return keys_.k_row(i); }, w_.k, w_.d_steps);
      pack_steps<P>(high - low, a_.d, [&](int64_t i) VEC_LAMBDA { return keys_.v_row(i); }, w_.v, w_.v_stride);
      for (int64_t from = 0; from < lanes_; from += panel) {
        const int64_t end = from + count(from) - 1;
        const int64_t begin_key = greater(low, w_.first[from] / P::step * P::step), end_key = lesser(high, w_.last[end]);
        if (begin_key >= end_key) continue;
        const bool opens = greater(begin, w_.first[from]) >= key;  // the panel's first block of this split
        const bool masked = w_.first[end] > begin_key || w_.last[from] < end_key;
        block(from, begin_key, end_key, begin_key - low, opens, masked);
      }
    }
  }

  // Keys [key, end) on one panel; they begin at index `at` of what is packed.
  void block(int64_t from, int64_t key, int64_t end, int64_t at, bool opens, bool masked) {
    const int64_t n = end - key, wide = width(from);
    ProductArgs<P> qk{w_.k + at * w_.d_steps, w_.d_steps * int64_t(sizeof(Element)), sizeof(Element),
                      w_.q + from * w_.d_steps, panel, w_.s, panel, n, wide, w_.d_steps};
    product<P, Start::zero>(qk);
    if (masked) {
      for (int64_t i = 0; i < wide; ++i) {  // lanes past the last count as it
        const int64_t lane = lesser(from + i, lanes_ - 1);
        w_.low[i] = static_cast<Acc>(greater(w_.first[lane] - key, 0));
        w_.high[i] = static_cast<Acc>(lesser(w_.last[lane] - key, n));
      }
    }
    if (masked) scores<true>(wide, n, at);
    else if (Keys::scaled || score_.cap > 0) scores<false>(wide, n, at);
    weights(from, wide, n, at);
    ProductArgs<P> pv{w_.v + at / P::step * w_.v_stride, sizeof(Element), w_.v_stride * int64_t(sizeof(Element)), w_.p, panel,
                      w_.o + from * a_.d, panel, a_.d, wide, (n + P::step - 1) / P::step, w_.factor};
    if (opens) product<P, Start::zero>(pv);
    else product<P, Start::scaled>(pv);
  }

  // Scales of the keys, soft-cap and mask on the products, where there are any.
  template <bool masked> void scores(int64_t wide, int64_t n, int64_t at) {
    const V cap(score_.cap), inverse(score_.inverse);
    for (int64_t i = 0; i < wide; i += V::size) {
      V low, high;
      if constexpr (masked) low = V::load(w_.low + i), high = V::load(w_.high + i);
      for (int64_t j = 0; j < n; ++j) {
        V s = V::load(w_.s + j * panel + i);
        if constexpr (Keys::scaled) s = s * V(static_cast<Acc>(keys_.k_scale(at + j)));
        if (score_.cap > 0) s = cap * tanh(s * inverse);
        if constexpr (masked) s = within(s, V(static_cast<Acc>(j)), low, high);
        s.store(w_.s + j * panel + i);
      }
    }
  }

  // Running maximum and sum, w_.factor = what they do to o, and the weights.
  void weights(int64_t from, int64_t wide, int64_t n, int64_t at) {
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
      const V old = V::load(w_.m + from + i);
      const V m = max(max(max(top[0], top[1]), max(top[2], top[3])) * factor, old), shift = finite_shift(m);
      const V scale = exp_of<T>(old - shift);
      m.store(w_.m + from + i);
      scale.store(w_.factor + i);
      const V sum = exponentials(s, w_.p + i, V(0) - shift, n, at);
      fma(scale, V::load(w_.l + from + i), sum).store(w_.l + from + i);
    }
  }

  VEC_INLINE V exponentials(const Acc* s, Element* p, V minus_shift, int64_t n, int64_t at) {
    const V factor(score_.factor);
    const auto weight = [&](int64_t j) VEC_LAMBDA { return exp_of<T>(fma(V::load(s + j * panel), factor, minus_shift)); };
    const auto scaled = [&](V x, int64_t j) VEC_LAMBDA {
      if constexpr (Keys::scaled) return x * V(static_cast<Acc>(keys_.v_scale(at + j)));
      else return x;
    };
    V sum(0);
    if constexpr (P::step == 2) {
      int64_t j = 0;
      for (; j + 2 <= n; j += 2) {
        const V x = weight(j), y = weight(j + 1);
        sum = sum + x + y;
        Weights<P>::store(p + j / 2 * panel, scaled(x, j), scaled(y, j + 1));
      }
      if (j < n) {
        const V x = weight(j);
        sum = sum + x;
        Weights<P>::store(p + j / 2 * panel, scaled(x, j), V(0));
      }
    } else {
      for (int64_t j = 0; j < n; ++j) {
        const V x = weight(j);
        sum = sum + x;
        Weights<P>::store(p + j * panel, scaled(x, j));
      }
    }
    return sum;
  }

  // The split just computed into the total; `alone`: there is none yet.
  void join(bool alone) {
    for (int64_t from = 0; from < lanes_; from += panel) {
      for (int64_t i = from; i < from + width(from); i += V::size) {
        const V old = V::load(w_.total_m + i), one = V::load(w_.m + i), m = max(one, old), shift = finite_shift(m);
        const V a = exp_of<T>(old - shift), b = exp_of<T>(one - shift), l = V::load(w_.l + i);
        m.store(w_.total_m + i);
        (alone ? l * b : V::load(w_.total_l + i) * a + l * b).store(w_.total_l + i);
        Acc *total = w_.total_o + from * a_.d + (i - from), *o = w_.o + from * a_.d + (i - from);
        for (int64_t e = 0; e < a_.d * panel; e += panel) {
          const V part = V::load(o + e) * b;
          (alone ? part : V::load(total + e) * a + part).store(total + e);
        }
      }
    }
  }

  const Attention& a_;
  const FlashUnit& u_;
  Keys keys_;
  const Score<Acc> score_;
  const int64_t lanes_;
  UnitScratch<T> w_;
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
