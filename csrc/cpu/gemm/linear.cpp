// Built for: avx2 avx512 avx512_bf16 amx
//
// A product of matrices whose order of sums depends on the length of the sum alone (pieces.h).
//
// Some rows of A at a time are packed for all threads (linear_pack). A tile (linear_tile) is one panel of B, the lanes of
// kTileVectors vectors, times these rows. It packs parts of the panel into the second-level cache, and multiplies each with one
// strip of rows after the other.
#include "../../linear.h"

#include "../dispatch.h"
#include "arena.h"
#include "pack.h"
#include "pieces.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

template <typename T> struct Linear {
  using P = matrix_t<T>;
  using E = typename P::Element;
  using Acc = typename P::Acc;
  using V = Vec<Acc>;
  using Sums = Pieces<P, kPanel<P>>;
  static constexpr int64_t step = P::step, size = sizeof(E), panel = kPanel<P>, kStrip = Sums::kStrip;
  // Steps of the sum for which B is packed at a time. Where A has at most kFewRows rows they are kFewSteps, so that the packed
  // part stays in the first-level cache.
  static constexpr int64_t kSteps = 1024, kFewSteps = 128, kFewRows = 24;
#if defined(CPU_CAPABILITY_AVX512)
  static constexpr int64_t kMostFew = 12;  // the most rows that few() computes: their sums fill the registers
#else
  static constexpr int64_t kMostFew = 8;
#endif
  static constexpr int64_t kCopied = 256;  // indices of the sum for which rows of B are copied at a time
  static constexpr int64_t kRows = 960;          // the most rows of A that are packed together,
  static constexpr int64_t kRowBytes = 8 << 20;  // and about how many bytes they may take

  const LinearProduct& p;

  // A part of B that is packed at a time: indices [k, k + d) of the sum for the columns from j on.
  struct Part { int64_t k, d, j; };

  static VEC_INLINE int64_t steps_of(int64_t n) { return round_up(n, P::depth) / step; }
  // Packed rows of A are an odd number of cache lines apart, so that a column of them falls into different sets of the cache.
  int64_t row_steps() const { return ((round_up(steps_of(p.k) * size, 64) / 64) | 1) * 64 / size; }
  Sums sums() const { return {p.k, p.piece, p.tree}; }
  int64_t group_steps() const { return p.capacity <= kFewRows ? kFewSteps : kSteps; }

  // ---------------------------------------------------------------------------------------------------- operands
  static VEC_INLINE const T* at(const LinearOperand& o, int64_t row, int64_t column) {
    return static_cast<const T*>(o.data) + row * o.stride + column;
  }
  // Copies n numbers of a row, rounded to T, with a 0 after an odd number of them.
  static void copy_row(const LinearOperand& o, int64_t row, int64_t column, int64_t n, T* to) {
    if (o.dtype == Dtype::f32 && !std::is_same_v<T, double>) {
      const float* from = static_cast<const float*>(o.data) + row * o.stride + column;
      for_vectors<Vec<float>, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
        if constexpr (!std::is_same_v<T, double>) store(to + j, load<Vec<float>>(from + j, lanes), lanes);
      });
    } else {
      std::memcpy(static_cast<void*>(to), at(o, row, column), static_cast<size_t>(n) * sizeof(T));
    }
    if (n % 2 != 0) std::memset(static_cast<void*>(to + n), 0, sizeof(T));
  }
  // Whether rows of the operand must be copied before they can be packed: their dtype differs, or a pair at the end lacks its
  // second number.
  bool copied(const LinearOperand& o, int64_t n) const { return o.dtype != p.dtype || (step == 2 && o.along && n % 2 != 0); }

  // Whether rows of A are operands as they stand in memory. Few rows are packed, because few() reads beyond them; AMX tiles
  // need rows that are padded.
  bool in_place() const {
    const bool same = step == 2 ? !kTiles<P> : std::is_same_v<T, Acc>;
    return same && p.a.along && !copied(p.a, p.k) && p.m > kMostFew;
  }

  struct Scratch {
    E* b;        // [kSteps][panel]
    Acc* sums;   // [strips][levels][kStrip][panel], one strip where B is packed for the whole sum at once; few(): [rows][panel]
    T* copies;   // rows of B that must be copied: [panel][kCopied], or [kCopied][panel]
    int64_t allocate(void* memory, const Linear& h) {
      Arena c(memory);
      c.take(b, kSteps * panel);
      const int64_t strips = h.group_steps() >= steps_of(h.p.k) ? 1 : Sums::strips(h.p.capacity);
      c.take(sums, greater(h.sums().levels() * strips * Sums::kLevel, kMostFew * panel));
      c.take(copies, kCopied * panel);
      return c.bytes;
    }
  };
  LinearSizes sizes() const {
    const int64_t row_bytes = row_steps() * size;
    return {clip(kRowBytes / row_bytes / 96 * 96, 96, kRows), in_place() ? 0 : row_bytes, Scratch().allocate(nullptr, *this),
            panel};
  }

  void pack(int64_t tile) const {
    E* to = static_cast<E*>(p.a_packed);
    const int64_t begin = tile * kLinearPackRows, end = lesser(begin + kLinearPackRows, p.rows), stride = row_steps();
    if (!p.a.along) {
      const auto row = [&](int64_t i) VEC_LAMBDA { return at(p.a, i, p.first + begin); };
      if constexpr (step == 1) pack_lanes<P>(p.k, end - begin, row, to + begin * stride, stride);
      else pack_steps_transposed<P>(p.k, end - begin, row, to + begin * stride, stride);
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      E* out = to + i * stride;
      if (copied(p.a, p.k)) {
        copy_row(p.a, p.first + i, 0, p.k, reinterpret_cast<T*>(out));
        if constexpr (kTiles<P>) std::memset(out + (p.k + 1) / 2, 0, (steps_of(p.k) - (p.k + 1) / 2) * size);
      } else {
        pack_rows<P>(1, p.k, [&](int64_t) VEC_LAMBDA { return at(p.a, p.first + i, 0); }, out, stride);
      }
    }
  }

  // Packs a part of B, `width` columns wide, a few steps at a time where its rows must be copied first.
  void pack_b(const Part& now, int64_t width, const Scratch& w) const {
    const bool copy = copied(p.b, now.k + now.d == p.k ? p.k : 0);
    const int64_t most = copy ? kCopied : now.d;
    for (int64_t done = 0; done < now.d; done += most) {
      const int64_t k = now.k + done, d = lesser(most, now.d - done);
      E* to = w.b + done / step * panel;
      if (p.b.along) {
        if (copy) for (int64_t i = 0; i < width; ++i) copy_row(p.b, now.j + i, k, d, w.copies + i * kCopied);
        pack_lanes<P>(width, copy && step == 2 ? d + d % 2 : d, [&](int64_t i) VEC_LAMBDA {
          return copy ? w.copies + i * kCopied : at(p.b, now.j + i, k);
        }, to, panel);
      } else {
        if (copy) for (int64_t i = 0; i < d; ++i) copy_row(p.b, k + i, now.j, width, w.copies + i * panel);
        pack_steps<P>(d, width, [&](int64_t i) VEC_LAMBDA {
          return copy ? w.copies + i * panel : at(p.b, k + i, now.j);
        }, to, panel);
      }
    }
  }

  // ---------------------------------------------------------------------------------------------------- prefetching
  Part part(int64_t k, int64_t j) const { return {k, lesser(p.k - k, group_steps() * step), j}; }
  Part after(const Part& now) const { return now.k + now.d < p.k ? part(now.k + now.d, now.j) : part(0, now.j + panel); }

  // Prefetches share i of `of` equal shares of a part of B into the second-level cache.
  void prefetch(const Part& next, int64_t i, int64_t of) const {
    if (next.j >= p.n) return;
    const int64_t width = lesser(panel, p.n - next.j), rows = p.b.along ? width : next.d;
    const int64_t bytes = (p.b.along ? next.d : width) * bytes_of(p.b.dtype);
    for (int64_t r = rows * i / of; r < rows * (i + 1) / of; ++r) {
      const int64_t row = p.b.along ? next.j + r : next.k + r, column = p.b.along ? next.k : next.j;
      const char* from = static_cast<const char*>(p.b.data) + (row * p.b.stride + column) * bytes_of(p.b.dtype);
      for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(from + line, _MM_HINT_T1);
    }
  }
  static int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

  // ---------------------------------------------------------------------------------------------------- products
  void tile(int64_t index, void* scratch) const {
    if (is_few()) return few_tile(index, scratch);
    Scratch w;
    w.allocate(scratch, *this);
    const int64_t j = index * panel, width = lesser(panel, p.n - j), n = round_up(width, V::size);
    const int64_t row_bytes = in_place() ? p.a.stride * static_cast<int64_t>(sizeof(T)) : row_steps() * size;
    const char* a = static_cast<const char*>(in_place() ? at(p.a, p.first, 0) : p.a_packed);
    const int64_t strips = Sums::strips(p.rows), each = sums().levels() * Sums::kLevel;
    if (p.k == 0) return write(0, p.rows, j, width, nullptr);
    for (Part now = part(0, j); now.j == j;) {
      const Part next = after(now);
      Chain chains[Sums::kChains];
      const int64_t count = sums().chains(now.k, now.k + now.d, chains);
      pack_b(now, width, w);
      for (int64_t i = 0; i < strips; ++i) {
        prefetch(next, i, strips);
        const int64_t row = Sums::strip_begin(i, p.rows), rows = Sums::strip_begin(i + 1, p.rows) - row;
        Acc* levels = w.sums + (now.d == p.k ? 0 : i * each);
        Sums::multiply(a + row * row_bytes + now.k / step * size, row_bytes, rows, w.b, n, chains, count, levels);
        if (next.j == j) continue;
        sums().finish(levels);
        write(row, rows, j, width, levels);
      }
      now = next;
    }
  }

  // ------------------------------------------------------------------------------------------------------- few rows
  // Few rows of A are bound by reading B, whose rows the sum runs along. As many rows of B as a vector has lanes are read side
  // by side, each from its beginning to its end, and transposed in registers. A has up to kCount rows.
  template <int kCount> void few(int64_t index, Acc* out) const {
    const int64_t j = index * V::size, width = lesser(V::size, p.n - j), bytes = row_steps() * size;
    const T* row[V::size];
    for (int64_t u = 0; u < V::size; ++u) row[u] = at(p.b, j + (u < width ? u : 0), 0);
    V level[8][kCount];
    int64_t used = 0;
    for (int64_t piece = 0; piece < sums().pieces(); ++piece, ++used) {
      const int64_t begin = piece * p.piece, end = lesser(begin + p.piece, p.k);
      V acc[kCount];
      const char* a = static_cast<const char*>(p.a_packed) + begin / step * size;
      for_vectors<V, Single>((end - begin) / step, [&](int64_t e, auto n) VEC_LAMBDA {
        V r[V::size];
#pragma GCC unroll 16
        for (int u = 0; u < V::size; ++u) {
          r[u] = Elements<P>::row(row[u] + begin, e, n);
          _mm_prefetch(reinterpret_cast<const char*>(row[u] + begin) + e * step * sizeof(T) + kAhead, _MM_HINT_T0);
        }
        transpose(r);
        int steps = V::size;
        if constexpr (std::is_same_v<decltype(n), int>) steps = n;
#pragma GCC unroll 16
        for (int u = 0; u < steps; ++u) {
#pragma GCC unroll 12
          for (int i = 0; i < kCount; ++i) {
            acc[i] = P::add_product(acc[i], lanes_of<P>(r[u]), P::broadcast(a + i * bytes + (e + u) * size));
          }
        }
      });
#pragma GCC unroll 12
      for (int i = 0; i < kCount; ++i) level[used][i] = acc[i];
      for (int64_t i = piece; i % 2 != 0; i >>= 1, --used) merge<kCount>(level[used - 1], level[used]);
    }
    for (; used > 1; --used) merge<kCount>(level[used - 2], level[used - 1]);
    for (int i = 0; i < kCount; ++i) (used == 0 ? V(0) : level[0][i]).store(out + i * panel);
    write(0, p.rows, j, width, out);
  }
  template <int kCount> static VEC_INLINE void merge(V* to, const V* from) {
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) to[i] = to[i] + from[i];
  }
  static constexpr int64_t kAhead = 1024;  // bytes

  bool is_few() const { return !kTiles<P> && p.tree && p.b.along && p.m <= kMostFew && !copied(p.b, p.k); }
  void few_tile(int64_t index, void* scratch) const {
    Scratch w;
    w.allocate(scratch, *this);
    for (int64_t i = index * kTileVectors; i < (index + 1) * kTileVectors && i * V::size < p.n; ++i) {
#define FEW(count) if (p.rows <= count) { few<count>(i, w.sums); continue; }
      FEW(1) FEW(2) FEW(3) FEW(4) FEW(6) FEW(8)
#if defined(CPU_CAPABILITY_AVX512)
      FEW(10) FEW(12)
#endif
#undef FEW
    }
  }

  // ----------------------------------------------------------------------------------------------------- the result
  // Rows [i, i + rows), columns [j, j + width).
  void write(int64_t i, int64_t rows, int64_t j, int64_t width, const Acc* sum) const {
    if (p.out_dtype == p.dtype) write_bias(static_cast<T*>(p.out), i, rows, j, width, sum);
    else write_bias(static_cast<Acc*>(p.out), i, rows, j, width, sum);
  }
  template <typename U> void write_bias(U* out, int64_t i, int64_t rows, int64_t j, int64_t width, const Acc* sum) const {
    if (p.bias_dtype == p.dtype) write_rows(out, static_cast<const T*>(p.bias), i, rows, j, width, sum);
    else write_rows(out, static_cast<const Acc*>(p.bias), i, rows, j, width, sum);
  }
  template <typename U, typename B>
  void write_rows(U* out, const B* bias, int64_t first, int64_t rows, int64_t j, int64_t width, const Acc* sum) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = p.first + first + i;
      U* to = out + row * p.out_stride + j;
      const U* residual = static_cast<const U*>(p.residual) + row * p.residual_stride + j;
      for_vectors<V, Single>(width, [&](int64_t e, auto n) VEC_LAMBDA {
        V x = sum == nullptr ? V(Acc(0)) : load<V>(sum + i * panel + e, n);
        if (bias != nullptr) x = x + load<V>(bias + j + e, n);
        if (p.residual != nullptr) x = x + load<V>(residual + e, n);
        store(to + e, x, n);
      });
    }
  }
};

}  // namespace

LinearSizes linear_sizes(const LinearProduct& a) {
  WITH_STORAGE(a.dtype, T, { return Linear<T>{a}.sizes(); })
  return {};
}
void linear_pack(const LinearProduct& a, int64_t tile) {
  WITH_STORAGE(a.dtype, T, { Linear<T>{a}.pack(tile); })
}
void linear_tile(const LinearProduct& a, int64_t tile, void* scratch) {
  begin_tiles();
  WITH_STORAGE(a.dtype, T, { Linear<T>{a}.tile(tile, scratch); })
  end_tiles();
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
