// Attention of a tile with few lanes (decode). A vector runs over keys in the first product and over d in the second, so that
// every row of keys and values is read once for all query heads of the group. Keys are transposed and pairs of values are
// interleaved in registers. Each score, sum and weighted value is the same chain of the same operations as in prefill.h, so
// that the bits are equal; not so for an int8 cache in builds that multiply it in integers (decode_int8.h).
#pragma once
#include "decode_int8.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr int64_t kDecodeLanes = 8;  // the most lanes of a decode tile
constexpr int64_t kDecodeKeys = 16;  // the rows of values whose products are added before the accumulators are stored

// s[r][i] = q[r] . k[i] for as many keys i as a vector has lanes, and for lanes r < kRows. Key i begins at keys[i] + offset.
// While it is read, key i + kAhead is prefetched.
template <typename P, int kRows, typename S>
__attribute__((noinline)) void decode_scores(const S* const* keys, int64_t offset, const typename P::Element* q,
                                             int64_t d_steps, typename P::Acc* s) {
  using V = Vec<typename P::Acc>;
  V acc[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[r] = V(0);
  for_vectors<V, Single>(d_steps, [&](int64_t e, auto n) VEC_LAMBDA {
    V k[V::size];
#pragma GCC unroll 16
    for (int i = 0; i < V::size; ++i) {
      prefetch_line(keys[kAhead + i] + offset + e * P::step);
      k[i] = Elements<P>::row(keys[i] + offset, e, n);
    }
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

// Whether values are loaded by interleaved_rows (gemm/pack.h), two vectors at a time. Their lanes are then in an order of its
// own, which o keeps until the result is written.
template <typename P, typename S> constexpr bool kInterleaved = P::step == 2 && is_bf16<S>;

// For kVectors vectors of d from element e on and n rows of values v[i]: o[r][e..] = start + sum over i of p[r][i] * v[i][e..],
// where start is 0 if `opens`, else factor[r] * o[r][e..] (o[r][e..] without a factor).
template <typename P, int kRows, int kVectors, typename S, typename N>
VEC_INLINE void decode_values(const S* const* values, int64_t offset, int64_t n, const typename P::Element* p,
                           const typename P::Acc* factor, bool opens, typename P::Acc* o, int64_t width, int64_t e, N lanes) {
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
    const S *a = values[i] + offset, *b = i + 1 < n ? values[i + 1] + offset : nullptr;
    V v[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = e + j * V::size;
      if (j * V::size * sizeof(S) % 64 == 0) {
        for (int u = 0; u < P::step; ++u) prefetch_line(values[kAhead + i + u] + offset + at);
      }
      if constexpr (kInterleaved<P, S> && kVectors % 2 == 0) {
        if (j % 2 == 0) Elements<P>::interleaved_rows(a, b, at, v[j], v[j + 1]);
      } else if constexpr (P::step == 2) {
        v[j] = Elements<P>::rows(a, b, at, lanes);
      } else {
        v[j] = Elements<P>::row(a, at, lanes);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto one = P::broadcast(reinterpret_cast<const char*>(p + r * (kBlock / P::step) + i / P::step));
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[r][j] = P::add_product(acc[r][j], one, lanes_of<P>(v[j]));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[r][j].store(o + r * width + e + j * V::size);
  }
}

template <typename P, int kRows, typename S>
__attribute__((noinline)) void decode_values_of(const S* const* values, int64_t offset, int64_t n,
                                                const typename P::Element* p, const typename P::Acc* factor, bool opens,
                                                typename P::Acc* o, int64_t width, int64_t d) {
  constexpr int64_t lanes = Vec<typename P::Acc>::size;
  constexpr int registers = kTileRows * kTileVectors, fit = registers / kRows;
  constexpr int vectors = fit >= 8 && kInterleaved<P, S> ? 8 : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
  int64_t e = 0;
  for (; e + vectors * lanes <= d; e += vectors * lanes) {
    decode_values<P, kRows, vectors>(values, offset, n, p, factor, opens, o, width, e, All{});
  }
  if constexpr (kInterleaved<P, S>) {
    for (; e + 2 * lanes <= d; e += 2 * lanes) {
      decode_values<P, kRows, 2>(values, offset, n, p, factor, opens, o, width, e, All{});
    }
  }
  for (; e + lanes <= d; e += lanes) decode_values<P, kRows, 1>(values, offset, n, p, factor, opens, o, width, e, All{});
  if (e < d) decode_values<P, kRows, 1>(values, offset, n, p, factor, opens, o, width, e, static_cast<int>(d - e));
}

template <typename T> struct DecodeScratch {
  using P = matrix_t<T>;
  using Acc = typename P::Acc;
  using Element = typename P::Element;
  // `lanes` are `rows` lanes of the first key head, then `rows` of the next, and so on.
  int64_t rows, lanes, d_steps, width, bytes;  // width: of a row of o
  Element* q;                                  // [lanes][d_steps]
  Element* p;                                  // [lanes][kBlock / step]
  Acc* s;                                      // [lanes][kBlock]
  State<Acc> part, total;                      // m, l: [lanes], o: [lanes][width]
  Acc* factor;                                 // [lanes]
  Acc *k_scale, *v_scale;                      // [kBlock]
  Acc* block;                                  // [lanes][width], where kSeparateBlocks: the accumulator of one block
  int64_t *first, *last;                       // [rows]
  Int8Scratch int8;                            // where kInt8

  DecodeScratch(int64_t heads, int64_t count, int64_t d, void* memory) {
    Arena arena(memory);
    rows = count <= 2 ? count : round_up(count, 2);  // an odd number is padded by a lane whose queries are 0
    lanes = heads * rows;
    d_steps = d / P::step;
    width = round_up(d, kIntegerProducts ? 64 : Vec<Acc>::size);
    arena.take(q, lanes * d_steps);
    arena.take(p, lanes * kBlock / P::step);
    arena.take(s, lanes * kBlock);
    part.allocate(arena, lanes, width);
    total.allocate(arena, lanes, width);
    arena.take(factor, lanes);
    arena.take(k_scale, kBlock);
    arena.take(v_scale, kBlock);
    if (kSeparateBlocks<P>) arena.take(block, lanes * width);
    arena.take(first, rows);
    arena.take(last, rows);
    int8.allocate(arena, lanes, width);
    bytes = arena.bytes;
  }
};

template <typename T, typename Keys> class Decode {
 public:
  using P = matrix_t<T>;
  using Acc = typename P::Acc;
  using V = Vec<Acc>;
  using Stored = typename Keys::Stored;

  Decode(const Attention& a, const AttentionTile& tile, const Keys& keys, void* scratch)
      : a_(a), tile_(tile), keys_(keys), score_(score_of<T>(a)), count_((tile.end - tile.begin) * a.group()), d_(a.d),
        w_(tile.kv_heads, count_, a.d, scratch) {
    map(0).ranges(w_.first, w_.last);
    for (int64_t h = 0; h < tile_.kv_heads; ++h) {
      auto* q = w_.q + h * w_.rows * w_.d_steps;
      pack_rows<P>(count_, d_, [&](int64_t i) VEC_LAMBDA { return map(h).q(i); }, q, w_.d_steps);
      for (int64_t i = count_ * w_.d_steps; i < w_.rows * w_.d_steps; ++i) q[i] = 0;
      if constexpr (kInt8<T, Stored>) {
        for (int64_t i = 0; i < w_.rows; ++i) {
          split_queries(map(h).q(lesser(i, count_ - 1)), d_, w_.int8, h * w_.rows + i);
        }
      }
    }
  }

  int64_t first_key() const { return w_.first[0]; }
  int64_t last_key() const { return w_.last[count_ - 1]; }
  const State<Acc>& part() const { return w_.part; }
  State<Acc> state_at(void* memory) const {
    State<Acc> state;
    Arena arena(memory);
    state.allocate(arena, w_.lanes, w_.width);
    return state;
  }

  void clear() { reset(w_.total, true); }

  void split(int64_t begin, const State<Acc>& part) {
    const int64_t first = greater(begin, first_key()), last = lesser(begin + kSplit, last_key());
    reset(part, last <= first);
    bool opens = true;
    for (int64_t key = begin + (first - begin) / kBlock * kBlock; key < last; key += kBlock) {
      const int64_t low = greater(first, key) / P::step * P::step, end = lesser(key + kBlock, last);
      block(part, low, end, lesser(end + kAhead, last), opens);
      opens = false;
    }
  }

  void join(const State<Acc>& part, bool alone) {
    for (int64_t r = 0; r < w_.lanes; ++r) {
      const Acc old = alone ? static_cast<Acc>(-kInfinity) : w_.total.m[r], one = part.m[r];
      const V m = max(V(one), V(old)), shift = finite_shift(m);
      const V a = exp_of<T>(V(old) - shift), b = exp_of<T>(V(one) - shift);
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
    for (int64_t h = 0; h < tile_.kv_heads; ++h) {
      for (int64_t i = 0; i < count_; ++i) {
        const int64_t r = h * w_.rows + i;
        const Acc l = w_.total.l[r];
        lse[map(h).lse(i)] = log_sum_exp<T>(w_.total.m[r], l);
        const V factor(reciprocal(l));
        T* to = map(h).out(out, i);
        Acc* o = w_.total.o + r * w_.width;
        if (l == 0) fill<V>(o, w_.width, 0);  // fully masked; 0 * NaN of another lane's value may stand in o
        if constexpr (kInt8<T, Stored>) in_order_of_elements(o, w_.width);
        if constexpr (kInterleaved<P, Stored>) {
          for (int64_t e = 0; e + 2 * V::size <= d_; e += 2 * V::size) {
            V x = V::load(o + e), y = V::load(o + e + V::size);
            undo_interleaved_rows(x, y);
            x.store(o + e);
            y.store(o + e + V::size);
          }
        }
        for_vectors<V, Single>(d_, [&](int64_t e, auto n) VEC_LAMBDA { store(to + e, V::load(o + e) * factor, n); });
      }
    }
  }

 private:
  VEC_INLINE LaneMap<T> map(int64_t h) const { return {a_, tile_, tile_.kv_head + h}; }

  void reset(const State<Acc>& state, bool values) {
    for (int64_t r = 0; r < w_.lanes; ++r) state.m[r] = static_cast<Acc>(-kInfinity), state.l[r] = 0;
    if (values) fill<V>(state.o, w_.lanes * w_.width, 0);
  }

  // Adds keys [key, end) to the state `part`; `opens`: they are its first. Keys [end, beyond) follow in the next block and are
  // prefetched. All heads take some rows before any head takes the next ones, so that memory is read in order.
  void block(const State<Acc>& part, int64_t key, int64_t end, int64_t beyond, bool opens) {
    const int64_t n = end - key, wide = round_up(n, greater(V::size, kDecodeKeys));
    // The rows in the order of their use: this block's keys, its values, and then for prefetching the first keys of the next
    // block, or the last row again where there is none.
    const Stored* rows[2 * kBlock + kAhead];
    keys_.select(key, n);
    for (int64_t i = 0; i < wide; ++i) {
      rows[i] = keys_.k_row(lesser(i, n - 1), tile_.kv_head);
      rows[wide + i] = keys_.v_row(lesser(i, n - 1), tile_.kv_head);
    }
    const Stored* const last = rows[2 * wide - 1];
    for (int64_t i = 0; i < kAhead; ++i) rows[2 * wide + i] = last;
    for (int64_t i = 0; i < n; i += V::size) {
      for (int64_t h = 0; h < tile_.kv_heads; ++h) {
        const int64_t r = h * w_.rows;
        with_rows([&](auto count) VEC_LAMBDA {
          if constexpr (kInt8<T, Stored>) {
            int8_scores<count()>(rows + i, keys_.k_head(h), w_.int8, r, d_, w_.s + r * kBlock + i);
          } else {
            decode_scores<P, count()>(rows + i, keys_.k_head(h), w_.q + r * w_.d_steps, w_.d_steps, w_.s + r * kBlock + i);
          }
        });
      }
    }
    for (int64_t r = 0; r < w_.lanes; ++r) weights(part, r, key, n);
    sums(part, key, n);
    if (beyond > end) {
      keys_.select(end, beyond - end);
      for (int64_t i = 0; i < beyond - end; ++i) rows[2 * wide + i] = keys_.k_row(i, tile_.kv_head);
    }
    if constexpr (kInt8<T, Stored>) return int8_values_of(part, rows + wide, n, opens);
    Acc* const o = kSeparateBlocks<P> ? w_.block : part.o;
    const Acc* const factor = kSeparateBlocks<P> ? nullptr : w_.factor;
    for (int64_t i = 0; i < n; i += kDecodeKeys) {
      for (int64_t h = 0; h < tile_.kv_heads; ++h) {
        const int64_t r = h * w_.rows;
        with_rows([&](auto count) VEC_LAMBDA {
          decode_values_of<P, count()>(rows + wide + i, keys_.v_head(h), lesser(kDecodeKeys, n - i),
                                    w_.p + (r * kBlock + i) / P::step, factor && i == 0 ? factor + r : nullptr,
                                    (opens || kSeparateBlocks<P>) && i == 0, o + r * w_.width, w_.width, d_);
        });
      }
    }
    if (kSeparateBlocks<P>) join_block(part.o, opens);
  }

  void join_block(Acc* o, bool opens) {
    for (int64_t r = 0; r < w_.lanes; ++r) {
      const V factor(w_.factor[r]);
      for (int64_t e = r * w_.width; e < (r + 1) * w_.width; e += V::size) {
        const V block = V::load(w_.block + e);
        (opens ? block : fma(factor, V::load(o + e), block)).store(o + e);
      }
    }
  }

  void int8_values_of(const State<Acc>& part, const Stored* const* rows, int64_t n, bool opens) {
    if constexpr (kInt8<T, Stored>) {
      for (int64_t i = 0; i < n; i += kInt8Keys) {
        for (int64_t h = 0; h < tile_.kv_heads; ++h) {
          const int64_t r = h * w_.rows;
          with_rows([&](auto count) VEC_LAMBDA {
            int8_values<count()>(rows + i, keys_.v_head(h), lesser(kInt8Keys, n - i), w_.int8, r, i, d_);
          });
        }
      }
      for (int64_t r = 0; r < w_.lanes; ++r) add_int8_values(w_.int8, r, w_.factor[r], opens, part.o + r * w_.width);
    }
  }

  template <typename F> VEC_INLINE void with_rows(const F& body) {
    switch (w_.rows) {
      case 1: return body(std::integral_constant<int, 1>{});
      case 2: return body(std::integral_constant<int, 2>{});
      case 4: return body(std::integral_constant<int, 4>{});
      case 6: return body(std::integral_constant<int, 6>{});
      default: return body(std::integral_constant<int, 8>{});
    }
  }

  // Loads the scales of a head's n keys and values; lanes beyond the last key get its scales.
  void scales(int64_t head, int64_t n) {
    for (int64_t i = 0; i < round_up(n, V::size); ++i) {
      w_.k_scale[i] = static_cast<Acc>(keys_.k_scale(lesser(i, n - 1), head));
      w_.v_scale[i] = static_cast<Acc>(keys_.v_scale(lesser(i, n - 1), head));
    }
    if constexpr (kInt8<T, Stored>) {  // the scale 1 of a row of zeros must not coarsen the integers of other rows
      for (int64_t i = 0; i < n; ++i) {
        if (w_.v_scale[i] != 1) continue;
        const Stored* row = keys_.v_row(i, head);
        int64_t e = 0;
        while (e < d_ && row[e] == 0) ++e;
        if (e == d_) w_.v_scale[i] = 0;
      }
    }
  }

  void weights(const State<Acc>& part, int64_t r, int64_t key, int64_t n) {
    const int64_t lane = lesser(r % w_.rows, count_ - 1), head = tile_.kv_head + r / w_.rows, wide = round_up(n, V::size);
    const int64_t first = greater(w_.first[lane] - key, 0), last = lesser(w_.last[lane] - key, n);
    const V low(static_cast<Acc>(first)), high(static_cast<Acc>(last)), cap(score_.cap), inverse(score_.inverse);
    if (Keys::scaled && r % w_.rows == 0) scales(head, n);
    Acc* s = w_.s + r * kBlock;
    V top(static_cast<Acc>(-kInfinity));
    for (int64_t i = 0; i < wide; i += V::size) {
      V x = V::load(s + i);
      if constexpr (kInt8<T, Stored>) x = x * V(w_.int8.q_scale[r]);
      if constexpr (Keys::scaled) x = x * V::load(w_.k_scale + i);
      if (score_.cap > 0) x = cap * tanh(x * inverse);
      if (first > 0 || last < wide) x = within(x, count_from<Acc>(i), low, high);
      x.store(s + i);
      top = max(x, top);
    }
    const V old(part.m[r]), m = max(V(largest(top)) * V(score_.factor), old), shift = finite_shift(m);
    m.store(part.m + r, 1);
    exp_of<T>(old - shift).store(w_.factor + r, 1);
    exponentials(s, w_.p + r * (kBlock / P::step), shift, n);
    if constexpr (kInt8<T, Stored>) split_weights(s, w_.v_scale, n, w_.int8, r);
  }

  // Turns the scores s of one lane into weights, in place as numbers and in p as operands of the second product.
  VEC_INLINE void exponentials(Acc* s, typename P::Element* p, V shift, int64_t n) {
    const V factor(score_.factor);
    for (int64_t i = 0; i < n; i += V::size) {
      V x = exp_of<T>(V::load(s + i) * factor - shift);
      x.store(s + i);
      if constexpr (Keys::scaled) x = x * V::load(w_.v_scale + i);
      if constexpr (!kInt8<T, Stored>) store_weights(p + i / P::step, x);
    }
  }

  // Sums the weights of each lane in the order of the keys, several lanes at a time, to hide the latency of the additions.
  void sums(const State<Acc>& part, int64_t key, int64_t n) {
    constexpr int64_t together = 8;
    for (int64_t r = 0; r < w_.lanes; r += together) {
      const Acc* s[together];
      Acc sum[together] = {};
      for (int64_t u = 0; u < together; ++u) s[u] = w_.s + lesser(r + u, w_.lanes - 1) * kBlock;
      for (int64_t i = 0; i < n;) {
        Acc chain[together] = {};
        for (const int64_t end = lesser(n, i + kSumChain<T> - (key + i) % kSumChain<T>); i < end; ++i) {
#pragma GCC unroll 8
          for (int64_t u = 0; u < together; ++u) chain[u] += s[u][i];
        }
        for (int64_t u = 0; u < together; ++u) sum[u] += chain[u];
      }
      for (int64_t u = 0; u < lesser(together, w_.lanes - r); ++u) {
        fma(V(w_.factor[r + u]), V(part.l[r + u]), V(sum[u])).store(part.l + r + u, 1);
      }
    }
  }

  const Attention& a_;
  const AttentionTile& tile_;
  Keys keys_;
  const Score<Acc> score_;
  const int64_t count_, d_;
  DecodeScratch<T> w_;
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
