// Built for: avx2 avx512 avx512_bf16 amx
//
// The backward of attention in five products, each of a block of keys against a block of queries (rows) of one head:
//   S = Q K^T,  P = exp(scale S - lse),  dV += P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dK += dS^T Q,  dQ += dS K
// A tile of work owns a block of keys, whose dK and dV stay in the second-level cache of its thread. dQ is summed in memory
// (FlashBwd::dq_sum). The key blocks add to it in rising order, and each waits until the one before has added its part
// (FlashBwd::turns), so that the speed of threads changes no bit. Tiles are handed out in rising order, so that the tile that
// is waited for is always running or done. Of the five products only S repeats work of the forward. At the edge of the mask
// each strip of rows takes only the keys that it sees, and each strip of keys only the rows that see it. Blocks of queries
// contain no fully masked rows: nothing of these is read.
#include <sched.h>

#include "../../flash_attention_bwd.h"
#include "common.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

template <typename T> struct Bwd {
  using P = matrix_t<T>;
  using E = typename P::Element;
  using Acc = typename P::Acc;
  using V = Vec<Acc>;
  static constexpr int64_t step = P::step, depth = P::depth, lanes = V::size;
  static constexpr int64_t kGrain = depth > lanes ? depth : lanes;  // ranges of keys at the mask's edge are multiples of this
  static constexpr int64_t kStrip = kTiles<P> ? 32 : 12;  // rows of S at a time: a multiple of the product's register tile
  static constexpr int64_t kSteps = (kBwdQueries + depth - 1) / depth * depth / step;
  static constexpr bool in_place = std::is_same_v<T, Acc> || (step == 2 && !kTiles<P>);  // products read q and dout in place
  // The stride of rows that are read down a column: an odd number of cache lines, so that the rows fall into different cache
  // sets.
  static constexpr int64_t kStride = kBwdKeys + 64 / static_cast<int64_t>(sizeof(E));

  // One thread's scratch. Each product is A B (../gemm/product.h); the comments say of which product an array is the operand A
  // or B, by the name of its result. Operands B lie in panels: [panel][k][kPanel lanes].
  struct Scratch {
    E *keys, *values;        // [d][keys]: keys is B of S, values B of dP
    E* key_rows;             // [keys][columns]: B of dQ
    E *q_rows, *dout_rows;   // [queries][columns]: q_rows is B of dK, dout_rows B of dV
    E *p, *ds;               // [queries][kStride]: transposed, p is A of dV and ds A of dK
    E* ds_rows;              // [queries][kStride / step]: A of dQ (the same memory as ds where step is 1)
    Acc *s, *dp;             // [kStrip][kBwdKeys]
    Acc *dk, *dv;            // [keys][columns]
    E *q, *dout;             // [queries][d]: converted copies of q and dout, where !in_place
    E *p_transposed, *ds_transposed;  // [keys][kSteps], only with AMX tiles: A of dV and A of dK

    // Takes the arrays from `memory` and returns their size in bytes.
    int64_t allocate(void* memory, int64_t d, int64_t columns) {
      Arena arena(memory);
      arena.take(keys, steps_of(d) * kBwdKeys);
      arena.take(values, steps_of(d) * kBwdKeys);
      arena.take(key_rows, kBwdKeys / step * round_up(columns, kPanel<P>));
      arena.take(q_rows, kSteps * round_up(columns, kPanel<P>));
      arena.take(dout_rows, kSteps * round_up(columns, kPanel<P>));
      arena.take(p, kBwdQueries / step * kStride);
      arena.take(ds, kBwdQueries / step * kStride);
      arena.take(ds_rows, step == 1 ? 0 : kBwdQueries * kStride / step);
      if (step == 1) ds_rows = ds;
      arena.take(s, kStrip * kBwdKeys);
      arena.take(dp, kStrip * kBwdKeys);
      arena.take(dk, kBwdKeys * columns);
      arena.take(dv, kBwdKeys * columns);
      arena.take(q, in_place ? 0 : kBwdQueries * steps_of(d));
      arena.take(dout, in_place ? 0 : kBwdQueries * steps_of(d));
      arena.take(p_transposed, kTiles<P> ? kBwdKeys * kSteps : 0);
      arena.take(ds_transposed, kTiles<P> ? kBwdKeys * kSteps : 0);
      return arena.bytes;
    }
  };

  // The number of elements of a packed operand that hold n numbers along k.
  static VEC_INLINE int64_t steps_of(int64_t n) { return round_up(n, depth) / step; }

  const FlashBwd& a;
  const BwdTile& tile;
  Scratch w;
  int64_t d, columns, sq, sk, shift;  // sq, sk: queries and keys; query row i has position i + shift among the keys
  int64_t first_unmasked;             // the first row that is not fully masked, where the first block of queries begins
  int64_t c0, nc, wide;               // this block has nc keys from key c0 on; wide is nc rounded up to a multiple of kGrain

  Bwd(const FlashBwd& args, const BwdTile& t, void* scratch) : a(args), tile(t), d(args.d), columns(round_up(args.d, lanes)) {
    w.allocate(scratch, d, columns);
    sq = a.length_q(t.sequence);
    sk = a.length_k(t.sequence);
    shift = sk - sq;
    first_unmasked = a.fully_masked_rows(t.sequence);
    c0 = t.block * kBwdKeys;
    nc = lesser(kBwdKeys, sk - c0);
    wide = round_up(nc, kGrain);
  }

  // The unmasked keys of row r in this block are [low(r), high(r)), counted from its first key.
  int64_t low(int64_t r) const { return clip(a.first_key(tile.sequence, r) - c0, 0, nc); }
  int64_t high(int64_t r) const { return clip(a.last_key(tile.sequence, r) - c0, 0, nc); }
  // The rows of [r0, r1) that see one of this block's keys [x, y) are [first_row, last_row).
  int64_t first_row(int64_t r0, int64_t r1, int64_t x) const {
    return a.window_right < 0 ? r0 : clip(c0 + x - shift - a.window_right, r0, r1);
  }
  int64_t last_row(int64_t r0, int64_t r1, int64_t y) const {
    return a.window_left < 0 ? r1 : clip(c0 + y - shift + a.window_left, r0, r1);
  }

  // Pack n rows of T, `stride` apart, into the panels of a B whose steps of k are the rows, or whose lanes are the rows.
  void pack_rows_as_steps(const T* rows, int64_t stride, int64_t n, E* out) const {
    const int64_t steps = steps_of(n);
    for (int64_t j = 0; j < columns; j += kPanel<P>) {
      pack_steps<P>(n, lesser(kPanel<P>, d - j), [&](int64_t i) VEC_LAMBDA { return rows + i * stride + j; },
                    out + j * steps, kPanel<P>);
    }
  }
  void pack_rows_as_lanes(const T* rows, int64_t stride, int64_t n, E* out) const {
    for (int64_t j = 0; j < n; j += kPanel<P>) {
      pack_lanes<P>(lesser(kPanel<P>, n - j), d, [&](int64_t i) VEC_LAMBDA { return rows + (j + i) * stride; },
                    out + j * steps_of(d), kPanel<P>);
    }
  }

  struct Operand { const void* p; int64_t row_bytes, step_bytes; };  // A of a product, with its strides

  struct Queries {
    const T *q, *dout;
    int64_t q_stride, dout_stride, r0, n;
    const Acc *shift, *delta, *dlse;
    Operand q_a, dout_a;
  };

  Queries rows_of(int64_t head, int64_t block) const {
    Queries r;
    r.r0 = first_unmasked + block * kBwdQueries;
    r.n = lesser(kBwdQueries, sq - r.r0);
    r.q_stride = a.q.token_stride;
    r.dout_stride = a.dout.token_stride;
    r.q = static_cast<const T*>(a.q.data) + a.offset_q(a.q, tile.sequence, head) + r.r0 * r.q_stride;
    r.dout = static_cast<const T*>(a.dout.data) + a.offset_q(a.dout, tile.sequence, head) + r.r0 * r.dout_stride;
    const int64_t at = a.offset_lse(tile.sequence, head) + r.r0;
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

  // Returns P of one row for a vector of keys, from their products s = q . k, and sets `slope` to the derivative of the
  // soft-cap.
  template <bool softcap> VEC_INLINE V probability(V s, V shift_, V& slope) const {
    const Score<Acc> score = score_of<T>(a);
    if constexpr (softcap) {
      const V t = tanh(s * V(score.inverse));
      slope = fnma(t, t, V(Acc(1)));
      s = t * V(score.cap);
    }
    return exp_of<T>(min(V(Acc(0)), fma(s, V(score.factor), V(Acc(0)) - shift_)));  // at most 1 even with a rounded lse
  }

  // Turns S and dP of rows [i, i + n) of the block of queries (n <= kStrip) and keys [from, to) into P and dS.
  template <bool masked, bool softcap>
  void gradients(const Queries& r, int64_t i, int64_t n, int64_t from, int64_t to) const {
    for (int64_t x = 0; x < n; x += step) {
      const int64_t row = i + x;
      E *p = w.p + row / step * kStride, *ds = w.ds + row / step * kStride;
      int64_t lo[2] = {0, 0}, hi[2] = {to, to};
      Acc delta[2];
      bool one_key[2] = {false, false};
      for (int64_t h = 0; h < step && x + h < n; ++h) {
        delta[h] = r.delta[row + h];
        if constexpr (masked) {
          const int64_t i = r.r0 + row + h;
          lo[h] = low(i), hi[h] = high(i);
          one_key[h] = a.last_key(tile.sequence, i) - a.first_key(tile.sequence, i) == 1;
          if (one_key[h]) delta[h] = r.dlse ? -r.dlse[row + h] : Acc(0);
        }
      }
      const auto at = [&](int64_t h, int64_t j, V& pv, V& dsv) VEC_LAMBDA {
        const int64_t source = (x + h) * kBwdKeys + j;
        const bool edge = masked && !(lo[h] <= j && j + lanes <= hi[h]);
        const int first = edge ? static_cast<int>(clip(lo[h] - j, 0, lanes)) : 0;
        const int last = edge ? static_cast<int>(clip(hi[h] - j, 0, lanes)) : 0;
        V s = V::load(w.s + source), dp = V::load(w.dp + source), slope;
        if (edge) s = between(s, first, last), dp = between(dp, first, last);
        pv = probability<softcap>(s, V(r.shift[row + h]), slope);
        if (edge) pv = between(pv, first, last);
        // A row that sees one key has P = 1 and out = v, so that dP - delta is exactly dlse: dP is taken as 0, delta as -dlse.
        if (masked && one_key[h]) dp = V(Acc(0));
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

  static VEC_INLINE void prefetch_rows(const void* p, int64_t bytes) {  // into the second-level cache
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T1);
  }

  // S and dP of the block in strips of rows, and from them P and dS.
  void strips(const Queries& r, bool full, const Acc* sum, bool fresh) const {
    const int64_t steps = steps_of(d);
    for (int64_t i = 0; i < r.n; i += kStrip) {
      const int64_t n = lesser(kStrip, r.n - i);
      if (!fresh) prefetch_rows(sum + i * columns, n * columns * static_cast<int64_t>(sizeof(Acc)));
      for (int64_t x = i; x < i + n && r.r0 + kBwdQueries + x < sq; ++x) {  // the next block's queries
        prefetch_rows(r.q + (kBwdQueries + x) * r.q_stride, d * static_cast<int64_t>(sizeof(T)));
        prefetch_rows(r.dout + (kBwdQueries + x) * r.dout_stride, d * static_cast<int64_t>(sizeof(T)));
      }
      const int64_t from = full ? 0 : low(r.r0 + i) / kGrain * kGrain;
      const int64_t to = full ? wide : greater(from, round_up(high(r.r0 + i + n - 1), kGrain));
      const auto multiply = [&](Operand rows, const E* b, Acc* out) VEC_LAMBDA {  // S has the same bits as in the forward
        product<P, Start::zero>({static_cast<const char*>(rows.p) + i * rows.row_bytes, rows.row_bytes, rows.step_bytes, b,
                                 kPanel<P>, steps * kPanel<P>, out, kBwdKeys, n, steps, from, to});
      };
      multiply(r.q_a, w.keys, w.s);
      multiply(r.dout_a, w.values, w.dp);
      if (a.softcap > 0) gradients<true, true>(r, i, n, from, to);
      else if (full) gradients<false, false>(r, i, n, from, to);
      else gradients<true, false>(r, i, n, from, to);
    }
  }

  // C = A B where `fresh`, else C += A B, over steps [first, last) of k. The product of a block is summed in an accumulator of
  // its own and then added to C: with one chain over 64k tokens the float32 error was 10 times larger.
  VEC_INLINE void add(bool fresh, Operand rows, int64_t m, const E* b, int64_t steps, int64_t first, int64_t last,
                      Acc* c) const {
    if (first >= last) {
      if (fresh) std::memset(c, 0, static_cast<size_t>(m * columns) * sizeof(Acc));
      return;
    }
    const ProductArgs<P> p{static_cast<const char*>(rows.p) + first * rows.step_bytes, rows.row_bytes, rows.step_bytes,
                           b + first * kPanel<P>, kPanel<P>, steps * kPanel<P>, c, columns, m, last - first, 0, columns};
    fresh ? product<P, Start::zero>(p) : product<P, Start::separate>(p);
  }

  void add_to_keys(const Queries& r, bool full, bool fresh) const {
    const int64_t steps = steps_of(r.n), strip = full ? nc : kStrip, size = sizeof(E);
    if constexpr (kTiles<P>) {
      transpose_block<P>((r.n + 1) / step, steps, wide, w.p, kStride, w.p_transposed, kSteps);
      transpose_block<P>((r.n + 1) / step, steps, wide, w.ds, kStride, w.ds_transposed, kSteps);
    }
    const auto column = [&](const E* rows, const E* transposed, int64_t x) {
      return kTiles<P> ? Operand{transposed + x * kSteps, kSteps * size, size} : Operand{rows + x, size, kStride * size};
    };
    for (int64_t x = 0; x < nc; x += strip) {
      const int64_t m = lesser(strip, nc - x);
      const int64_t first = full ? 0 : (first_row(r.r0, r.r0 + r.n, x) - r.r0) / depth * depth / step;
      const int64_t last = full ? steps : steps_of(last_row(r.r0, r.r0 + r.n, x + m) - r.r0);
      add(fresh, column(w.p, w.p_transposed, x), m, w.dout_rows, steps, first, last, w.dv + x * columns);
      add(fresh, column(w.ds, w.ds_transposed, x), m, w.q_rows, steps, first, last, w.dk + x * columns);
    }
  }

  void add_to_queries(const Queries& r, bool full, bool fresh, Acc* sum) const {
    const int64_t steps = steps_of(nc), strip = full ? r.n : kStrip;
    const int64_t row_bytes = kStride / step * static_cast<int64_t>(sizeof(E));
    for (int64_t i = 0; i < r.n; i += strip) {
      const int64_t n = lesser(strip, r.n - i);
      const int64_t first = full ? 0 : low(r.r0 + i) / depth * depth / step;
      const int64_t last = full ? steps : steps_of(high(r.r0 + i + n - 1));
      const Operand rows{reinterpret_cast<const char*>(w.ds_rows) + i * row_bytes, row_bytes, sizeof(E)};
      add(fresh, rows, n, w.key_rows, steps, first, last, sum + i * columns);
    }
  }

  void query_block(int64_t head, int64_t block, bool fresh, int64_t turn, bool last_turn) const {
    const Queries r = rows_of(head, block);
    const bool full = nc == wide && low(r.r0 + r.n - 1) == 0 && high(r.r0) == nc;
    const int64_t token = (a.cu_q ? a.cu_q[tile.sequence] : tile.sequence * a.seqlen_q) + r.r0;
    Acc* sum = static_cast<Acc*>(a.dq_sum) + (head * a.tokens_q + token) * columns;
    strips(r, full, sum, turn == 0);
    add_to_keys(r, full, fresh);
    int32_t* turns = a.turns + head * a.q_blocks[a.sequences] + a.q_blocks[tile.sequence] + block;
    for (int64_t spin = 0; __atomic_load_n(turns, __ATOMIC_ACQUIRE) != turn; ++spin) {
      if (spin < 4096) _mm_pause();
      else sched_yield();
    }
    add_to_queries(r, full, turn == 0, sum);
    if (last_turn) write(sum, r.n, static_cast<T*>(a.dq) + (token * a.heads + head) * d, a.heads, a.scale);
    __atomic_store_n(turns, static_cast<int32_t>(turn + 1), __ATOMIC_RELEASE);
  }

  // Writes n rows of sums, times factor, as T to the result, whose rows are heads * d apart.
  void write(const Acc* sum, int64_t n, T* out, int64_t heads, double factor) const {
    const V scale(static_cast<Acc>(factor));
    for (int64_t i = 0; i < n; ++i) {
      for_vectors<V, Single>(d, [&](int64_t j, auto part) VEC_LAMBDA {
        store(out + i * heads * d + j, load<V>(sum + i * columns + j, part) * scale, part);
      });
    }
  }

  void run() {
    const T* k = static_cast<const T*>(a.k.data) + a.offset_k(a.k, tile.sequence, tile.head) + c0 * a.k.token_stride;
    const T* v = static_cast<const T*>(a.v.data) + a.offset_k(a.v, tile.sequence, tile.head) + c0 * a.v.token_stride;
    pack_rows_as_lanes(k, a.k.token_stride, nc, w.keys);
    pack_rows_as_lanes(v, a.v.token_stride, nc, w.values);
    pack_rows_as_steps(k, a.k.token_stride, nc, w.key_rows);
    bool fresh = true;
    for (int64_t head = tile.head * a.group(); head < (tile.head + 1) * a.group(); ++head) {
      for (int64_t r0 = first_unmasked, block = 0; r0 < sq; r0 += kBwdQueries, ++block) {
        const int64_t first = a.first_key(tile.sequence, r0) / kBwdKeys;  // the blocks of keys that these rows see
        const int64_t last = (a.last_key(tile.sequence, lesser(r0 + kBwdQueries, sq) - 1) + kBwdKeys - 1) / kBwdKeys;
        if (tile.block < first || tile.block >= last) continue;
        query_block(head, block, fresh, tile.block - first, tile.block == last - 1);
        fresh = false;
      }
    }
    if (fresh) {
      const size_t bytes = static_cast<size_t>(nc * columns) * sizeof(Acc);
      std::memset(w.dk, 0, bytes), std::memset(w.dv, 0, bytes);
    }
    const int64_t token = (a.cu_k ? a.cu_k[tile.sequence] : tile.sequence * a.seqlen_k) + c0;
    write(w.dk, nc, static_cast<T*>(a.dk) + (token * a.kv_heads + tile.head) * d, a.kv_heads, a.scale);
    write(w.dv, nc, static_cast<T*>(a.dv) + (token * a.kv_heads + tile.head) * d, a.kv_heads, 1.0);
  }
};

// Computes FlashBwd::shift and delta for a block of queries, and sets dq to 0 in its fully masked rows, which nothing else
// writes.
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

BwdSizes flash_attention_bwd_sizes(const Attention& a) {
  WITH_STORAGE(a.dtype, T, {
    const int64_t columns = round_up(a.d, Bwd<T>::lanes);
    return {columns, typename Bwd<T>::Scratch().allocate(nullptr, a.d, columns)};
  })
  return {};
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
