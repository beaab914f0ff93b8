// Attention's backward in five products, each a block of keys against a block of queries (rows) of one head:
//   S = Q K^T,  P = exp(scale S - lse),  dV += P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dK += dS^T Q,  dQ += dS K
// A unit of work owns a block of keys: its dK and dV stay in its thread's second-level cache. dQ is summed in memory, the
// key blocks taking their turns in rising order: no thread's pace changes a bit, and of the products only S is one that was
// done before, by the forward. Units are handed out in rising order, so that whoever waits for its turn waits for a unit that
// is running. At the edge of the mask each strip of rows takes only the keys, and each strip of keys only the rows, that it
// needs. Rows that see no key stand in no block: nothing that they hold, or that was given for them, is read.
#pragma once
#include <sched.h>

#include "../flash_attention_bwd.h"
#include "attention.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

template <typename T> struct Bwd {
  using P = matrix_t<T>;
  using E = typename P::Element;
  using Acc = typename P::Acc;
  using V = Vec<Acc>;
  static constexpr int64_t step = P::step, depth = P::depth, lanes = V::size;
  static constexpr int64_t kGrain = depth > lanes ? depth : lanes;  // keys at the edge of the mask
  static constexpr int64_t kStrip = kTiles<P> ? 32 : 12;  // rows of S, and of the edge: a multiple of a product's tile
  static constexpr int64_t kSteps = (kBwdQueries + depth - 1) / depth * depth / step;
  // dK and dV add up what a block of queries each gives: hundreds of float32 numbers at length, whose sums round more than all
  // before them. What each took off is summed beside them.
  static constexpr bool kRest = std::is_same_v<T, float>;
  static constexpr bool in_place = std::is_same_v<T, Acc> || (step == 2 && !kTiles<P>);  // the products read rows of T
  // Rows of lanes that are read down a column: an odd number of cache lines apart, lest they share the same few sets.
  static constexpr int64_t kStride = kBwdKeys + 64 / static_cast<int64_t>(sizeof(E));

  // One thread's scratch. B operands lie in panels: [panel][k][kPanel lanes].
  struct Scratch {
    E *keys, *values;        // [d][keys], for S and dP
    E* key_rows;             // [keys][columns], for dQ
    E *q_rows, *dout_rows;   // [queries][columns], for dK and dV
    E *p, *ds;               // [queries][kStride]: columns are A's rows of dK and dV
    E *ds_rows, *ds_rest;    // [queries][kStride / step]: A's rows of dQ (ds where step is 1), and what rounding took
    Acc *s, *dp;             // [kStrip][kBwdKeys]
    Acc *dk, *dv;            // [keys][columns], where kRest two of them
    E *q, *dout;             // [queries][d] converted, where the products do not read T
    E *p_turned, *ds_turned; // [keys][kSteps], for tiles: A's rows of dV and dK

    // Returns the bytes that it takes.
    int64_t carve(void* memory, int64_t d, int64_t columns) {
      Carver carver(memory);
      carver.take(keys, steps_of(d) * kBwdKeys);
      carver.take(values, steps_of(d) * kBwdKeys);
      carver.take(key_rows, kBwdKeys / step * columns);
      carver.take(q_rows, kSteps * columns);
      carver.take(dout_rows, kSteps * columns);
      carver.take(p, kBwdQueries / step * kStride);
      carver.take(ds, kBwdQueries / step * kStride);
      carver.take(ds_rows, step == 1 ? 0 : kBwdQueries * kStride / step);
      carver.take(ds_rest, step == 1 ? 0 : kBwdQueries * kStride / step);
      if (step == 1) ds_rows = ds;
      carver.take(s, kStrip * kBwdKeys);
      carver.take(dp, kStrip * kBwdKeys);
      carver.take(dk, (kRest ? 2 : 1) * kBwdKeys * columns);
      carver.take(dv, (kRest ? 2 : 1) * kBwdKeys * columns);
      carver.take(q, in_place ? 0 : kBwdQueries * steps_of(d));
      carver.take(dout, in_place ? 0 : kBwdQueries * steps_of(d));
      carver.take(p_turned, kTiles<P> ? kBwdKeys * kSteps : 0);
      carver.take(ds_turned, kTiles<P> ? kBwdKeys * kSteps : 0);
      return carver.bytes;
    }
  };

  static int64_t columns_of(const Attention& a) { return round_up(a.d, lanes); }
  static VEC_INLINE int64_t steps_of(int64_t n) { return round_up(n, depth) / step; }  // elements of n indices along k

  const FlashBwd& a;
  const BwdUnit& unit;
  Scratch w;
  int64_t d, columns, sq, sk, shift;    // shift: a row's position less its index
  int64_t seeing;                       // the first row that sees a key: there the first block of queries begins
  int64_t c0, nc, wide;                 // this block's keys: the first, how many, rounded up to whole vectors

  Bwd(const FlashBwd& args, const BwdUnit& u, void* scratch) : a(args), unit(u), d(args.d), columns(columns_of(args)) {
    w.carve(scratch, d, columns);
    sq = a.length_q(u.sequence);
    sk = a.length_k(u.sequence);
    shift = sk - sq;
    seeing = a.blind_rows(u.sequence);
    c0 = u.block * kBwdKeys;
    nc = lesser(kBwdKeys, sk - c0);
    wide = round_up(nc, kGrain);
  }

  // This block's keys [low, high) that row r may see.
  int64_t low(int64_t r) const { return clip(a.first_key(unit.sequence, r) - c0, 0, nc); }
  int64_t high(int64_t r) const { return clip(a.last_key(unit.sequence, r) - c0, 0, nc); }
  // The rows of [r0, r1) that see a key of this block's [x, y).
  int64_t first_row(int64_t r0, int64_t r1, int64_t x) const {
    return a.window_right < 0 ? r0 : clip(c0 + x - shift - a.window_right, r0, r1);
  }
  int64_t last_row(int64_t r0, int64_t r1, int64_t y) const {
    return a.window_left < 0 ? r1 : clip(c0 + y - shift + a.window_left, r0, r1);
  }

  // n rows of T, `stride` apart, as B operand whose k is the row, and as one whose lanes are the rows.
  void pack_rows_as_steps(const T* rows, int64_t stride, int64_t n, E* out) const {
    const int64_t steps = steps_of(n);
    for (int64_t j = 0; j < columns; j += kPanel<P>) {
      pack_steps<P>(n, lesser(kPanel<P>, d - j), [&](int64_t i) VEC_LAMBDA { return rows + i * stride + j; },
                    out + j * steps, lesser(kPanel<P>, columns - j));
    }
  }
  void pack_rows_as_lanes(const T* rows, int64_t stride, int64_t n, E* out) const {
    for (int64_t j = 0; j < n; j += kPanel<P>) {
      pack_lanes<P>(lesser(kPanel<P>, n - j), d, [&](int64_t i) VEC_LAMBDA { return rows + (j + i) * stride; },
                    out + j * steps_of(d), lesser(kPanel<P>, wide - j));
    }
  }

  // A's rows as the products read them.
  struct Operand { const void* p; int64_t row_bytes, step_bytes; };

  // Lanes [from, to) of C = A B, k in [first, last), for B in panels of `steps` rows, `n` lanes in all.
  template <Start start>
  void multiply(Operand rows, int64_t m, const E* b, int64_t steps, int64_t n, int64_t from, int64_t to, int64_t first,
                int64_t last, Acc* c, int64_t c_stride) const {
    const char* begin_a = static_cast<const char*>(rows.p) + first * rows.step_bytes;
    for (int64_t j = from / kPanel<P> * kPanel<P>; j < to; j += kPanel<P>) {
      const int64_t width = lesser(kPanel<P>, n - j), begin = greater(from - j, 0), end = lesser(to - j, width);
      product<P, start>({begin_a, rows.row_bytes, rows.step_bytes, b + j * steps + first * width + begin, width,
                         c + j + begin, c_stride, m, end - begin, last - first, nullptr, kBwdKeys * columns});
    }
  }

  struct Queries {
    const T *q, *dout;
    int64_t q_stride, dout_stride, r0, n;
    bool exact;  // see rows_of
    const Acc *shift, *delta, *dlse;
    Operand q_a, dout_a;
  };

  // `exact`: the rows see no other block of keys. Their weights are the largest, and what is rounded to 16 bits on the
  // way would cost dQ as much as its own rounding does: there delta is summed from P and dP rather than from the rounded
  // out, and dS enters dQ in two parts.
  Queries rows_of(int64_t head, int64_t block, bool exact) const {
    Queries r;
    r.exact = exact && sizeof(T) == 2;
    r.r0 = seeing + block * kBwdQueries;
    r.n = lesser(kBwdQueries, sq - r.r0);
    r.q_stride = a.q.token_stride;
    r.dout_stride = a.dout.token_stride;
    r.q = static_cast<const T*>(a.q.data) + a.offset_q(a.q, unit.sequence, head) + r.r0 * r.q_stride;
    r.dout = static_cast<const T*>(a.dout.data) + a.offset_q(a.dout, unit.sequence, head) + r.r0 * r.dout_stride;
    const int64_t at = a.offset_lse(unit.sequence, head) + r.r0;
    r.shift = static_cast<const Acc*>(a.shift) + at;
    r.delta = static_cast<const Acc*>(a.delta) + at;
    r.dlse = a.dlse ? static_cast<const Acc*>(a.dlse) + at : nullptr;
    pack_rows_as_steps(r.q, r.q_stride, r.n, w.q_rows);
    pack_rows_as_steps(r.dout, r.dout_stride, r.n, w.dout_rows);
    const int64_t size = sizeof(T);
    r.q_a = {r.q, r.q_stride * size, step * size};
    r.dout_a = {r.dout, r.dout_stride * size, step * size};
    if constexpr (!in_place) {
      const int64_t steps = steps_of(d), element = sizeof(E);
      pack_rows<P>(r.n, d, [&](int64_t i) VEC_LAMBDA { return r.q + i * r.q_stride; }, w.q, steps);
      pack_rows<P>(r.n, d, [&](int64_t i) VEC_LAMBDA { return r.dout + i * r.dout_stride; }, w.dout, steps);
      r.q_a = {w.q, steps * element, element};
      r.dout_a = {w.dout, steps * element, element};
    }
    return r;
  }

  // P of one vector of keys, and the factor that the soft-cap adds to its dS.
  template <bool softcap> VEC_INLINE V probability(V s, V shift_, V& slope) const {
    const Score<Acc> score = score_of<T>(a);
    if constexpr (softcap) {
      const V t = tanh(s * V(score.inverse));
      slope = fnma(t, t, V(Acc(1)));
      s = t * V(score.cap);
    }
    return exp_of<T>(min(V(Acc(0)), fma(s, V(score.factor), V(Acc(0)) - shift_)));  // the lse is rounded: not above 1
  }

  // Rows [i, i + n) of the block (at most kStrip): their S and dP, of keys [from, to), become P and dS.
  template <bool masked, bool softcap>
  void gradients(const Queries& r, int64_t i, int64_t n, int64_t from, int64_t to) const {
    for (int64_t x = 0; x < n; x += step) {
      const int64_t row = i + x;
      E *p = w.p + row / step * kStride, *ds = w.ds + row / step * kStride;
      int64_t lo[2] = {0, 0}, hi[2] = {to, to};
      Acc delta[2];
      const auto terms = [&](int64_t h, int64_t j, V& dp, V& slope) VEC_LAMBDA {  // returns P
        const int64_t source = (x + h) * kBwdKeys + j;
        V s = V::load(w.s + source);
        dp = V::load(w.dp + source);
        if (!masked || (lo[h] <= j && j + lanes <= hi[h])) return probability<softcap>(s, V(r.shift[row + h]), slope);
        const int first = static_cast<int>(clip(lo[h] - j, 0, lanes));
        const int last = static_cast<int>(clip(hi[h] - j, 0, lanes));
        s = between(s, first, last);
        dp = between(dp, first, last);
        return between(probability<softcap>(s, V(r.shift[row + h]), slope), first, last);
      };
      for (int64_t h = 0; h < step && x + h < n; ++h) {
        if constexpr (masked) lo[h] = low(r.r0 + row + h), hi[h] = high(r.r0 + row + h);
        delta[h] = r.delta[row + h];
        if (!r.exact) continue;
        V sum(Acc(0)), dp, slope;
        for (int64_t j = from; j < to; j += lanes) {
          const V pv = terms(h, j, dp, slope);
          sum = fma(pv, dp, sum);
        }
        delta[h] = sum.sum() - (r.dlse ? r.dlse[row + h] : Acc(0));
      }
      const auto at = [&](int64_t h, int64_t j, V& pv, V& dsv) VEC_LAMBDA {
        V dp, slope;
        pv = terms(h, j, dp, slope);
        dsv = pv * (dp - V(delta[h]));
        if constexpr (softcap) dsv = dsv * slope;
      };
      if constexpr (masked) {
        clear(p, 0, from), clear(p, to, wide), clear(ds, 0, from), clear(ds, to, wide);
      }
      for (int64_t j = from; j < to; j += lanes) {
        if constexpr (step == 1) {
          V pv, dsv;
          at(0, j, pv, dsv);
          pv.store(p + j);
          dsv.store(ds + j);
        } else {
#if defined(CPU_CAPABILITY_AVX512_BF16)
          const __m512i woven = weave();
          V p0, p1, ds0, ds1;
          at(0, j, p0, ds0);
          if (x + 1 < n) at(1, j, p1, ds1);
          const __m512i both_p = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(p1.v, p0.v));
          const __m512i both_ds = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(ds1.v, ds0.v));
          _mm512_storeu_si512(p + j, _mm512_permutexvar_epi16(woven, both_p));
          _mm512_storeu_si512(ds + j, _mm512_permutexvar_epi16(woven, both_ds));
          store_rows(w.ds_rows + (row * kStride + j) / 2, both_ds);
          if (r.exact) {
            const V rest0 = ds0 - V(V::widen(_mm512_castsi512_si256(both_ds)));
            const V rest1 = ds1 - V(V::widen(_mm512_extracti64x4_epi64(both_ds, 1)));
            const __m512i both_rest = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(rest1.v, rest0.v));
            store_rows(w.ds_rest + (row * kStride + j) / 2, both_rest);
          }
#endif
        }
      }
    }
  }
#if defined(CPU_CAPABILITY_AVX512_BF16)
  static VEC_INLINE void store_rows(E* to, __m512i both) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kStride / 2), _mm512_extracti64x4_epi64(both, 1));
  }
  static VEC_INLINE __m512i weave() {  // 16-bit indices (0, 16, 1, 17, ...)
    const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(_mm512_or_si512(i, _mm512_slli_epi32(i, 16)), _mm512_set1_epi32(0x100000));
  }
#endif
  static VEC_INLINE void clear(E* p, int64_t from, int64_t to) {
    if (from < to) std::memset(p + from, 0, static_cast<size_t>(to - from) * sizeof(E));
  }

  // Sums over d in the chains of the forward, so that S is bitwise what lse was made of.
  VEC_INLINE void scores(Operand rows, int64_t n, const E* b, int64_t from, int64_t to, Acc* out) const {
    const int64_t steps = steps_of(d), chain = kChain<P> / step;
    multiply<Start::zero>(rows, n, b, steps, wide, from, to, 0, lesser(chain, steps), out, kBwdKeys);
    for (int64_t e = chain; e < steps; e += chain) {
      multiply<Start::apart>(rows, n, b, steps, wide, from, to, e, lesser(e + chain, steps), out, kBwdKeys);
    }
  }

  // Into the second-level cache: what is next added to dQ, and the next rows.
  static VEC_INLINE void ask(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T1);
  }

  void strips(const Queries& r, bool full, const Acc* sum, bool fresh) const {
    for (int64_t i = 0; i < r.n; i += kStrip) {
      const int64_t n = lesser(kStrip, r.n - i);
      if (!fresh) ask(sum + i * columns, n * columns * static_cast<int64_t>(sizeof(Acc)));
      for (int64_t x = i; x < i + n && r.r0 + kBwdQueries + x < sq; ++x) {
        ask(r.q + (kBwdQueries + x) * r.q_stride, d * static_cast<int64_t>(sizeof(T)));
        ask(r.dout + (kBwdQueries + x) * r.dout_stride, d * static_cast<int64_t>(sizeof(T)));
      }
      const int64_t from = full ? 0 : low(r.r0 + i) / kGrain * kGrain;
      const int64_t to = full ? wide : greater(from, round_up(high(r.r0 + i + n - 1), kGrain));
      const auto down = [&](Operand x) {
        return Operand{static_cast<const char*>(x.p) + i * x.row_bytes, x.row_bytes, x.step_bytes};
      };
      scores(down(r.q_a), n, w.keys, from, to, w.s);
      scores(down(r.dout_a), n, w.values, from, to, w.dp);
      if (a.softcap > 0) gradients<true, true>(r, i, n, from, to);
      else if (full) gradients<false, false>(r, i, n, from, to);
      else gradients<true, false>(r, i, n, from, to);
    }
  }

  // C = A B, or C += A B, in which a chain is a block: one over 64k tokens was 10 times less exact in float32.
  template <Start more> VEC_INLINE void add(bool fresh, Operand rows, int64_t m, const E* b, int64_t steps, int64_t first, int64_t last,
                      Acc* c) const {
    if (first >= last) {
      if (fresh) std::memset(c, 0, static_cast<size_t>(m * columns) * sizeof(Acc));
    } else if (fresh) {
      multiply<Start::zero>(rows, m, b, steps, columns, 0, columns, first, last, c, columns);
    } else {
      multiply<more>(rows, m, b, steps, columns, 0, columns, first, last, c, columns);
    }
  }

  void add_to_keys(const Queries& r, bool full, bool fresh) const {
    const int64_t steps = steps_of(r.n), strip = full ? nc : kStrip, size = sizeof(E);
    if constexpr (kTiles<P>) {
      turn<P>((r.n + 1) / step, steps, wide, w.p, kStride, w.p_turned, kSteps);
      turn<P>((r.n + 1) / step, steps, wide, w.ds, kStride, w.ds_turned, kSteps);
    }
    const auto column = [&](const E* lying, const E* turned, int64_t x) {
      return kTiles<P> ? Operand{turned + x * kSteps, kSteps * size, size} : Operand{lying + x, size, kStride * size};
    };
    constexpr Start kMore = kRest ? Start::exact : Start::apart;
    for (int64_t x = 0; x < nc; x += strip) {
      const int64_t m = lesser(strip, nc - x);
      const int64_t first = full ? 0 : (first_row(r.r0, r.r0 + r.n, x) - r.r0) / depth * depth / step;
      const int64_t last = full ? steps : steps_of(last_row(r.r0, r.r0 + r.n, x + m) - r.r0);
      add<kMore>(fresh, column(w.p, w.p_turned, x), m, w.dout_rows, steps, first, last, w.dv + x * columns);
      add<kMore>(fresh, column(w.ds, w.ds_turned, x), m, w.q_rows, steps, first, last, w.dk + x * columns);
    }
  }

  void add_to_queries(const Queries& r, bool full, bool fresh, Acc* sum) const {
    const int64_t steps = steps_of(nc), strip = full ? r.n : kStrip;
    const int64_t row_bytes = kStride / step * static_cast<int64_t>(sizeof(E));
    for (int64_t i = 0; i < r.n; i += strip) {
      const int64_t n = lesser(strip, r.n - i);
      const int64_t first = full ? 0 : low(r.r0 + i) / depth * depth / step;
      const int64_t last = full ? steps : steps_of(high(r.r0 + i + n - 1));
      const auto part = [&](const E* ds, bool alone) {
        const void* rows = reinterpret_cast<const char*>(ds) + i * row_bytes;
        add<Start::apart>(alone, {rows, row_bytes, sizeof(E)}, n, w.key_rows, steps, first, last, sum + i * columns);
      };
      part(w.ds_rows, fresh);
      if (step > 1 && r.exact) part(w.ds_rest, false);
    }
  }

  void query_block(int64_t head, int64_t block, bool fresh, int64_t turn, bool last_turn) const {
    const Queries r = rows_of(head, block, turn == 0 && last_turn);
    const bool full = nc == wide && low(r.r0 + r.n - 1) == 0 && high(r.r0) == nc;
    const int64_t token = (a.cu_q ? a.cu_q[unit.sequence] : unit.sequence * a.seqlen_q) + r.r0;
    Acc* sum = static_cast<Acc*>(a.dq_sum) + (head * a.tokens_q + token) * columns;
    strips(r, full, sum, turn == 0);
    add_to_keys(r, full, fresh);
    int32_t* turns = a.turns + head * a.q_blocks[a.sequences] + a.q_blocks[unit.sequence] + block;
    for (int64_t spin = 0; __atomic_load_n(turns, __ATOMIC_ACQUIRE) != turn; ++spin) {
      if (spin < 4096) _mm_pause();
      else sched_yield();
    }
    add_to_queries(r, full, turn == 0, sum);
    if (last_turn) write(sum, r.n, static_cast<T*>(a.dq) + (token * a.heads + head) * d, a.heads, a.scale);
    __atomic_store_n(turns, static_cast<int32_t>(turn + 1), __ATOMIC_RELEASE);
  }

  // Sums to T, rows of the result `heads` * d apart; `rest`: where theirs lie beyond them.
  void write(const Acc* sum, int64_t n, T* out, int64_t heads, double factor, int64_t rest = 0) const {
    const V scale(static_cast<Acc>(factor));
    for (int64_t i = 0; i < n; ++i) {
      for_vectors<V, Single>(d, [&](int64_t j, auto part) VEC_LAMBDA {
        V total = load<V>(sum + i * columns + j, part);
        if (rest) total = total + load<V>(sum + rest + i * columns + j, part);
        store(out + i * heads * d + j, total * scale, part);
      });
    }
  }

  void run() {
    const T* k = static_cast<const T*>(a.k.data) + a.offset_k(a.k, unit.sequence, unit.head) + c0 * a.k.token_stride;
    const T* v = static_cast<const T*>(a.v.data) + a.offset_k(a.v, unit.sequence, unit.head) + c0 * a.v.token_stride;
    pack_rows_as_lanes(k, a.k.token_stride, nc, w.keys);
    pack_rows_as_lanes(v, a.v.token_stride, nc, w.values);
    pack_rows_as_steps(k, a.k.token_stride, nc, w.key_rows);
    const int64_t rest = kRest ? kBwdKeys * columns : 0;
    const size_t sums = static_cast<size_t>(nc * columns) * sizeof(Acc);
    if (kRest) std::memset(w.dk + rest, 0, sums), std::memset(w.dv + rest, 0, sums);
    bool fresh = true;
    for (int64_t head = unit.head * a.group(); head < (unit.head + 1) * a.group(); ++head) {
      for (int64_t r0 = seeing, block = 0; r0 < sq; r0 += kBwdQueries, ++block) {
        const int64_t first = a.first_key(unit.sequence, r0) / kBwdKeys;  // the key blocks that these rows see
        const int64_t last = (a.last_key(unit.sequence, lesser(r0 + kBwdQueries, sq) - 1) + kBwdKeys - 1) / kBwdKeys;
        if (unit.block < first || unit.block >= last) continue;
        query_block(head, block, fresh, unit.block - first, unit.block == last - 1);
        fresh = false;
      }
    }
    if (fresh) std::memset(w.dk, 0, sums), std::memset(w.dv, 0, sums);
    const int64_t token = (a.cu_k ? a.cu_k[unit.sequence] : unit.sequence * a.seqlen_k) + c0;
    write(w.dk, nc, static_cast<T*>(a.dk) + (token * a.kv_heads + unit.head) * d, a.kv_heads, a.scale, rest);
    write(w.dv, nc, static_cast<T*>(a.dv) + (token * a.kv_heads + unit.head) * d, a.kv_heads, 1.0, rest);
  }
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
