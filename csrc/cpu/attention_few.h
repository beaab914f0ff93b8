// Attention of a unit with few lanes (decode): lanes of a vector run over keys in the first product and over d in the second,
// so that every row of keys and values is read once for all query heads of the group. Keys are turned on their side in
// registers, pairs of values are laid together in registers. Each score, sum and weighted value is the same chain of the same
// operations as in attention_unit.h.
#pragma once
#include "attention.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr int64_t kFewLanes = 8, kFewKeys = 16;  // kFewKeys: rows of values between two visits to the accumulators

template <typename T> struct FewScratch {
  using P = matrix_t<T>;
  using Acc = typename P::Acc;
  using Element = typename P::Element;
  int64_t d_steps, width, bytes;  // width: of a row of o
  Element *q, *p;                 // [kFewLanes][d_steps], [kFewLanes][kBlock / step]
  Acc* s;                         // [kFewLanes][kBlock]
  State<Acc> part, total;         // o: [kFewLanes][width]
  Acc* factor;
  int64_t *first, *last;

  FewScratch(int64_t d, void* memory) {
    Carver carver(memory);
    d_steps = d / P::step;
    width = round_up(d, Vec<Acc>::size);
    carver.take(q, kFewLanes * d_steps);
    carver.take(p, kFewLanes * kBlock / P::step);
    carver.take(s, kFewLanes * kBlock);
    carver.take(part, kFewLanes, width);
    carver.take(total, kFewLanes, width);
    carver.take(factor, kFewLanes);
    carver.take(first, kFewLanes);
    carver.take(last, kFewLanes);
    bytes = carver.bytes;
  }
};

// s[r][i] = q[r] . k[i] for a vector's worth of keys, rows r < kRows.
template <typename P, int kRows, typename S>
__attribute__((noinline)) void few_scores(const S* const* keys, const typename P::Element* q, int64_t d_steps,
                                          typename P::Acc* s) {
  using V = Vec<typename P::Acc>;
  V acc[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[r] = V(0);
  for_vectors<V, Single>(d_steps, [&](int64_t e, auto n) VEC_LAMBDA {
    V k[V::size];
#pragma GCC unroll 16
    for (int i = 0; i < V::size; ++i) k[i] = Elements<P>::row(keys[i], e, n);
    transpose(k);
    const auto step = [&](int u) VEC_LAMBDA {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const auto* from = reinterpret_cast<const char*>(q + r * d_steps + e + u);
        acc[r] = P::add_product(acc[r], P::broadcast(from), lanes_of<P>(k[u]));
      }
    };
    if constexpr (std::is_same_v<decltype(n), int>) {
      for (int u = 0; u < n; ++u) step(u);
    } else {
#pragma GCC unroll 16
      for (int u = 0; u < V::size; ++u) step(u);
    }
  });
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[r].store(s + r * kBlock);
}

// o[r][e..] = (opens ? 0 : factor[r] * o[r][e..]) + sum of p[r][i] * v[i][e..] over rows of values; kVectors of d at a time.
template <typename P, int kRows, int kVectors, typename S, typename N>
VEC_INLINE void few_values(const S* const* values, int64_t n, const typename P::Element* p, const typename P::Acc* factor,
                           bool opens, typename P::Acc* o, int64_t width, int64_t e, N lanes) {
  using V = Vec<typename P::Acc>;
  V acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      acc[r][j] = opens ? V(0) : V::load(o + r * width + e + j * V::size);
      if (factor != nullptr && !opens) acc[r][j] = acc[r][j] * V(factor[r]);
    }
  }
  for (int64_t i = 0; i < n; i += P::step) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      V v;
      if constexpr (P::step == 2) v = Elements<P>::rows(values[i], i + 1 < n ? values[i + 1] : nullptr, e + j * V::size, lanes);
      else v = Elements<P>::row(values[i], e + j * V::size, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const auto* from = reinterpret_cast<const char*>(p + r * (kBlock / P::step) + i / P::step);
        acc[r][j] = P::add_product(acc[r][j], P::broadcast(from), lanes_of<P>(v));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[r][j].store(o + r * width + e + j * V::size);
  }
}

template <typename P, int kRows, typename S>
__attribute__((noinline)) void few_values_of(const S* const* values, int64_t n, const typename P::Element* p,
                                             const typename P::Acc* factor, bool opens, typename P::Acc* o, int64_t width,
                                             int64_t d) {
  constexpr int64_t lanes = Vec<typename P::Acc>::size;
  constexpr int registers = kTileRows * kTileVectors, vectors = kRows * 4 <= registers ? 4 : kRows * 2 <= registers ? 2 : 1;
  int64_t e = 0;
  for (; e + vectors * lanes <= d; e += vectors * lanes) {
    few_values<P, kRows, vectors>(values, n, p, factor, opens, o, width, e, All{});
  }
  for (; e + lanes <= d; e += lanes) few_values<P, kRows, 1>(values, n, p, factor, opens, o, width, e, All{});
  if (e < d) few_values<P, kRows, 1>(values, n, p, factor, opens, o, width, e, static_cast<int>(d - e));
}

template <typename T, typename Keys> class Few {
 public:
  using P = matrix_t<T>;
  using Acc = typename P::Acc;
  using V = Vec<Acc>;
  using Stored = typename Keys::Stored;

  Few(const Attention& a, const FlashUnit& u, const Keys& keys, void* scratch)
      : keys_(keys), score_(score_of<T>(a)), map_(a, u), d_(a.d), lanes_(map_.count()), w_(a.d, scratch) {
    map_.ranges(w_.first, w_.last);
    rows_ = lanes_ <= 2 ? lanes_ : round_up(lanes_, 2);  // one more lane for an odd number: its queries are 0
    pack_rows<P>(lanes_, d_, [&](int64_t i) VEC_LAMBDA { return map_.q(i); }, w_.q, w_.d_steps);
    for (int64_t i = lanes_ * w_.d_steps; i < rows_ * w_.d_steps; ++i) w_.q[i] = 0;
  }

  int64_t first_key() const { return w_.first[0]; }
  int64_t last_key() const { return w_.last[lanes_ - 1]; }
  const State<Acc>& part() const { return w_.part; }
  State<Acc> state_at(void* memory) const {
    State<Acc> state;
    Carver(memory).take(state, kFewLanes, w_.width);
    return state;
  }

  void clear() {
    for (int64_t r = 0; r < lanes_; ++r) w_.total.m[r] = static_cast<Acc>(-kInfinity), w_.total.l[r] = 0;
    fill<V>(w_.total.o, lanes_ * w_.width, 0);
  }

  void split(int64_t begin, const State<Acc>& part) {
    const int64_t first = greater(begin, first_key()), last = lesser(begin + kSplit, last_key());
    for (int64_t r = 0; r < rows_; ++r) part.m[r] = static_cast<Acc>(-kInfinity), part.l[r] = 0;
    if (last <= first) fill<V>(part.o, lanes_ * w_.width, 0);
    bool opens = true;
    for (int64_t key = begin + (first - begin) / kBlock * kBlock; key < last; key += kBlock) {
      const int64_t low = greater(first, key) / P::step * P::step;
      block(part, low, lesser(key + kBlock, last), opens);
      opens = false;
    }
  }

  void join(const State<Acc>& part, bool alone) {
    for (int64_t r = 0; r < lanes_; ++r) {
      const Acc old = alone ? static_cast<Acc>(-kInfinity) : w_.total.m[r], one = part.m[r];
      const V m = max(V(one), V(old)), shift = finite_shift(m), a = exp_of<T>(V(old) - shift), b = exp_of<T>(V(one) - shift);
      const V l = V(part.l[r]) * b;
      m.store(w_.total.m + r, 1);
      (alone ? l : V(w_.total.l[r]) * a + l).store(w_.total.l + r, 1);
      for (int64_t e = r * w_.width; e < (r + 1) * w_.width; e += V::size) {
        const V add = V::load(part.o + e) * b;
        (alone ? add : V::load(w_.total.o + e) * a + add).store(w_.total.o + e);
      }
    }
  }

  void finish(const AttentionTensor& out, Acc* lse) {
    for (int64_t r = 0; r < lanes_; ++r) {
      const Acc l = w_.total.l[r];
      lse[map_.lse(r)] = log_sum_exp<T>(w_.total.m[r], l);
      const V factor(reciprocal(l));
      T* to = map_.out(out, r);
      for_vectors<V, Single>(d_, [&](int64_t e, auto n) VEC_LAMBDA {
        store(to + e, V::load(w_.total.o + r * w_.width + e) * factor, n);
      });
    }
  }

 private:
  // Keys [key, end).
  void block(const State<Acc>& part, int64_t key, int64_t end, bool opens) {
    const int64_t n = end - key;
    const Stored* rows[kBlock];
    keys_.select(key, n);
    const int64_t wide = round_up(n, V::size);
    for (int64_t i = 0; i < wide; ++i) rows[i] = keys_.k_row(lesser(i, n - 1));  // beyond the end: any row, masked below
    for (int64_t i = 0; i < n; i += V::size) {
      with_rows([&](auto count) VEC_LAMBDA { few_scores<P, count()>(rows + i, w_.q, w_.d_steps, w_.s + i); });
    }
    for (int64_t r = 0; r < rows_; ++r) weights(part, r, key, n);
    for (int64_t i = 0; i < n; ++i) rows[i] = keys_.v_row(i);
    for (int64_t i = 0; i < n; i += kFewKeys) {
      with_rows([&](auto count) VEC_LAMBDA {
        few_values_of<P, count()>(rows + i, lesser(kFewKeys, n - i), w_.p + i / P::step, i == 0 ? w_.factor : nullptr,
                                  opens && i == 0, part.o, w_.width, d_);
      });
    }
  }

  template <typename F> VEC_INLINE void with_rows(const F& body) {
    switch (rows_) {
      case 1: return body(std::integral_constant<int, 1>{});
      case 2: return body(std::integral_constant<int, 2>{});
      case 4: return body(std::integral_constant<int, 4>{});
      case 6: return body(std::integral_constant<int, 6>{});
      default: return body(std::integral_constant<int, 8>{});
    }
  }

  void weights(const State<Acc>& part, int64_t r, int64_t key, int64_t n) {
    const int64_t lane = lesser(r, lanes_ - 1), wide = round_up(n, V::size);
    const int64_t first = greater(w_.first[lane] - key, 0), last = lesser(w_.last[lane] - key, n);
    const V low(static_cast<Acc>(first)), high(static_cast<Acc>(last)), cap(score_.cap), inverse(score_.inverse);
    Acc* s = w_.s + r * kBlock;
    V top(static_cast<Acc>(-kInfinity));
    for (int64_t i = 0; i < wide; i += V::size) {
      V x = V::load(s + i);
      if constexpr (Keys::scaled) x = x * keys_.template k_scales<V>(i);
      if (score_.cap > 0) x = cap * tanh(x * inverse);
      if (first > 0 || last < wide) x = within(x, count_from<Acc>(i), low, high);
      x.store(s + i);
      top = max(x, top);
    }
    Acc lanes[V::size];
    top.store(lanes);
    Acc most = lanes[0];
    for (int i = 1; i < V::size; ++i) most = lanes[i] > most ? lanes[i] : most;
    const V old(part.m[r]), m = max(V(most) * V(score_.factor), old), shift = finite_shift(m), scale = exp_of<T>(old - shift);
    m.store(part.m + r, 1);
    scale.store(w_.factor + r, 1);
    const Acc sum = exponentials(s, w_.p + r * (kBlock / P::step), V(0) - shift, n, wide);
    fma(scale, V(part.l[r]), V(sum)).store(part.l + r, 1);
  }

  // The weights of one lane as operands; returns their sum, added in the order of the keys.
  VEC_INLINE Acc exponentials(Acc* s, typename P::Element* p, V minus_shift, int64_t n, int64_t wide) {
    const V factor(score_.factor);
    for (int64_t i = 0; i < wide; i += V::size) {
      const V x = exp_of<T>(fma(V::load(s + i), factor, minus_shift));
      x.store(s + i);
      V y = x;
      if constexpr (Keys::scaled) y = x * keys_.template v_scales<V>(i);
      store_weights<P>(p + i / P::step, y);
    }
    Acc sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += s[i];
    return sum;
  }

  Keys keys_;
  const Score<Acc> score_;
  const LaneMap<T> map_;
  const int64_t d_, lanes_;
  int64_t rows_;
  FewScratch<T> w_;
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
