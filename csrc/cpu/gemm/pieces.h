// Products whose order of sums depends on the length of the sum alone, so that an element of the result has the same bits
// whatever stands beside it. The sum is cut into pieces. Each is one chain of fused multiply-adds, as product.h describes it.
// The pieces are added in a balanced tree: pieces 2i and 2i + 1, then neighbouring sums of two pieces, and so on. Or they are
// added one after the other.
#pragma once
#include "arena.h"
#include "product.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

// Sums over k indices in pieces of `piece`, for strips of kStrip rows of A and kWidth columns of B. The sums of a strip stand
// in levels [levels()][kStrip][kWidth]: a level holds a sum that waits for its neighbour in the tree.
template <typename P, int64_t kWidth> struct Pieces {
  using E = typename P::Element;
  using Acc = typename P::Acc;
  using V = Vec<Acc>;
  static constexpr int64_t step = P::step, size = sizeof(E);
  static constexpr int64_t kStrip = kTiles<P> ? 32 : kTileRows, kLevel = kStrip * kWidth;

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

  // Adds indices [from, to) of the sum for a strip of `rows` rows: `a` is its first row, whole; `b` is packed [steps][kWidth]
  // from index `from` on, of which the first n columns are computed. Calls for one strip follow each other in rising order.
  void multiply(const E* a, int64_t row_steps, int64_t rows, int64_t from, int64_t to, const E* b, int64_t n,
                Acc* levels) const {
    for (int64_t at = from, end; at < to; at = end) {
      const int64_t i = at / piece;
      end = lesser((i + 1) * piece, to);
      const bool fresh = at % piece == 0, last = end == (i + 1) * piece || end == k;
      const int64_t merges = last ? merges_after(i) : 0;
      Acc* sum = levels + used_before(i) * kLevel;
      const auto run = [&](auto start, int64_t merged) VEC_LAMBDA {
        product<P, start()>({a + at / step, row_steps * size, size, b + (at - from) / step * kWidth, kWidth, kPanel<P>, sum,
                             kWidth, rows, steps_of(end - at), 0, n, nullptr, merged, kLevel});
      };
      if constexpr (kTiles<P>) {
        if (fresh) run(std::integral_constant<Start, Start::zero>{}, 0);
        else run(std::integral_constant<Start, Start::continued>{}, 0);
        for (int64_t u = 1; u <= merges; ++u) merge(sum - u * kLevel);
      } else if (merges > 0) {
        if (fresh) run(std::integral_constant<Start, Start::tree>{}, merges);
        else run(std::integral_constant<Start, Start::continued_tree>{}, merges);
      } else {
        if (fresh) run(std::integral_constant<Start, Start::zero>{}, 0);
        else run(std::integral_constant<Start, Start::continued>{}, 0);
      }
    }
  }

  // Completes the sums of a strip, which are then in its first level.
  void finish(Acc* levels) const {
    for (int64_t used = used_before(pieces()); used > 1; --used) merge(levels + (used - 2) * kLevel);
  }

 private:
  // Adds the level above to a level.
  static void merge(Acc* sum) {
    for (int64_t i = 0; i < kLevel; i += V::size) (V::load(sum + i) + V::load(sum + kLevel + i)).store(sum + i);
  }
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
