// Products whose order of sums depends on the length of the sum alone, so that an element of the result has the same bits
// whatever stands beside it. The sum is cut into pieces. Each is one chain of fused multiply-adds, as product.h describes it.
// The pieces are added in a balanced tree: pieces 2i and 2i + 1, then neighbouring sums of two pieces, and so on. Or they are
// added one after the other.
#pragma once
#include "arena.h"
#include "product.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

// A part of a piece that is multiplied at a time: `steps` steps of one chain. It starts from what its level holds, unless it is
// `fresh`. Where it ends its piece, its sum is added to `merges` levels before, and stands in the last of these.
struct Chain {
  int64_t steps, level, merges;
  bool fresh;
};

// Sums over k indices in pieces of `piece`, for strips of kStrip rows of A and kWidth columns of B. The sums of a strip stand
// in levels [levels()][kStrip][kWidth]: a level holds a sum that waits for its neighbour in the tree.
template <typename P, int64_t kWidth> struct Pieces {
  using E = typename P::Element;
  using Acc = typename P::Acc;
  using V = Vec<Acc>;
  static constexpr int64_t step = P::step, size = sizeof(E);
  static constexpr int64_t kStrip = kTiles<P> ? 32 : kTileRows, kLevel = kStrip * kWidth;
  static constexpr int64_t kAhead = 24;   // steps of B that are prefetched ahead: it comes from the second-level cache
  static constexpr int64_t kChains = 16;  // more than a part of the sum has

  int64_t k, piece;
  bool tree;

  static VEC_INLINE int64_t steps_of(int64_t n) { return round_up(n, P::depth) / step; }
  int64_t pieces() const { return (k + piece - 1) / piece; }
  int64_t levels() const {
    int64_t n = 2;
    if (tree) for (int64_t i = pieces() - 1; i > 1; i >>= 1) ++n;
    return n;
  }
  int64_t merges_after(int64_t i) const { return tree ? __builtin_ctzll(~static_cast<uint64_t>(i)) : i > 0; }
  int64_t used_before(int64_t i) const { return tree ? __builtin_popcountll(static_cast<uint64_t>(i)) : i > 0; }

  // Strips of nearly equal height, so that none has only one or two rows of several. AMX tiles compute whole strips as fast.
  static int64_t strips(int64_t rows) { return (rows + kStrip - 1) / kStrip; }
  static int64_t strip_begin(int64_t i, int64_t rows) {
    if constexpr (kTiles<P>) return lesser(i * kStrip, rows);
    const int64_t n = strips(rows);
    return rows / n * i + lesser(i, rows % n);
  }

  // Writes the chains of indices [from, to) of the sum, which begin and end with a piece or hold a part of one. Returns their
  // number.
  int64_t chains(int64_t from, int64_t to, Chain* out) const {
    int64_t count = 0;
    for (int64_t at = from, end; at < to; at = end) {
      const int64_t i = at / piece;
      end = lesser((i + 1) * piece, to);
      const bool last = end == (i + 1) * piece || end == k;
      out[count++] = {steps_of(end - at), used_before(i), last ? merges_after(i) : 0, at % piece == 0};
    }
    return count;
  }

  // Computes chains for a strip of `rows` rows: `a` is its first row from the first chain's beginning on, rows are row_bytes
  // apart, with any alignment; `b` is packed
  // [steps][kWidth], of which the first n columns are computed. Calls for one strip follow each other in rising order.
  static void multiply(const char* a, int64_t row_bytes, int64_t rows, const E* b, int64_t n, const Chain* chains,
                       int64_t count, Acc* levels) {
    if constexpr (kTiles<P>) {
      for (const Chain* c = chains; c < chains + count; ++c) {
        Acc* sum = levels + c->level * kLevel;
        const ProductArgs<P> product_args{a, row_bytes, size, b, kWidth, kPanel<P>, sum, kWidth, rows, c->steps, 0, n};
        if (c->fresh) product<P, Start::zero>(product_args);
        else product<P, Start::separate>(product_args);  // with AMX tiles a chain that starts at what C holds
        for (int64_t u = 1; u <= c->merges; ++u) merge(sum - u * kLevel);
        a += c->steps * size;
        b += c->steps * kWidth;
      }
    } else {
      for (int64_t j = 0; j < n; j += kPanel<P>) {
        switch (rows * 8 + lesser(n - j, kPanel<P>) / V::size) {
#define TILE(height, vectors) \
  case height * 8 + vectors: tile<height, vectors>(a, row_bytes, b + j, chains, count, levels + j); break;
#define TILES(vectors) \
  TILE(1, vectors) TILE(2, vectors) TILE(3, vectors) TILE(4, vectors) TILE(5, vectors) TILE(6, vectors)
          TILES(1)
          TILES(2)
#if defined(CPU_CAPABILITY_AVX512)
          TILES(3)
          TILES(4)
#endif
#undef TILES
#undef TILE
        }
      }
    }
  }

  // Completes the sums of a strip, which are then in its first level.
  void finish(Acc* levels) const {
    for (int64_t used = used_before(pieces()); used > 1; --used) merge(levels + (used - 2) * kLevel);
  }

 private:
  template <int kRows, int kVectors>
  __attribute__((noinline)) static void tile(const char* a, int64_t row_bytes, const E* b, const Chain* chains, int64_t count,
                                             Acc* levels) {
    for (const Chain* c = chains; c < chains + count; ++c) {
      Acc* sum = levels + c->level * kLevel;
      V acc[kRows][kVectors];
      const auto each = [&](const auto& body) VEC_LAMBDA {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) body(acc[i][j], sum + i * kWidth + j * V::size);
        }
      };
      if (!c->fresh) each([](V& x, const Acc* at) VEC_LAMBDA { x = V::load(at); });
      for (int64_t k = 0; k < c->steps; ++k) {
        typename P::Lanes lanes[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          lanes[j] = P::load(b + j * V::size);
          _mm_prefetch(reinterpret_cast<const char*>(b + j * V::size + kAhead * kWidth), _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const typename P::Lanes one = P::broadcast(a + i * row_bytes);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) acc[i][j] = P::add_product(acc[i][j], one, lanes[j]);
        }
        a += size;
        b += kWidth;
      }
      for (int64_t u = 0; u < c->merges; ++u) {
        sum -= kLevel;
        each([](V& x, const Acc* at) VEC_LAMBDA { x = V::load(at) + x; });
      }
      each([](const V& x, Acc* at) VEC_LAMBDA { x.store(at); });
    }
  }
  // Adds the level above to a level.
  static void merge(Acc* sum) {
    for (int64_t i = 0; i < kLevel; i += V::size) (V::load(sum + i) + V::load(sum + kLevel + i)).store(sum + i);
  }
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
