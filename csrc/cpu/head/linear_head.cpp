// Built for: avx2 avx512 avx512_bf16 amx
//
// The head over a vocabulary in three products, S = H W^T, dW += G^T H, dH = G W, for one chunk of tokens at a time:
//   scores   S. A tile is kHeadBlock columns of the vocabulary (a block). Rows of W become lanes. S of all tokens of the chunk
//            stays in the second-level cache. What is kept are its statistics and, for gradients, what HeadStore says.
//   merge    The statistics of the blocks, in rising order, become lse (head_logits.h).
//   dweight  dW. A tile is kHeadSpan columns of the vocabulary (a span). Their G, the gradient of S, is formed in place,
//            rounded to its type, and multiplied with the hidden states of all tokens of the chunk.
//   dhidden  dH. A tile is some rows and columns of it, summed over the whole vocabulary, span after span.
// The order of sums is fixed: that of S is the one of `linear` (gemm/pieces.h); an element of dH adds one chain for each span,
// and an element of dW one chain for each chunk, in rising order. So no result depends on tiling or threads, and the statistics
// and dH of a token do not depend on other tokens.
#include "../../linear.h"
#include "../gemm/arena.h"
#include "../gemm/pack.h"
#include "../gemm/pieces.h"
#include "head_logits.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

template <typename T> struct Head : HeadRows<T> {
  using Rows = HeadRows<T>;
  using typename Rows::Acc;
  using typename Rows::G;
  using typename Rows::V;
  using Rows::a;
  using P = matrix_t<T>;
  using E = typename P::Element;
  static constexpr int64_t step = P::step, depth = P::depth, lanes = V::size, size = sizeof(E);
  using Sums = Pieces<P, kHeadBlock>;
  static constexpr int64_t kSteps = step == 1 ? 512 : 1024;  // steps of k for which W is packed at a time
  static constexpr int64_t kStrip = kTiles<P> ? 32 : kTileRows;
  static constexpr bool in_place = step == 2 || std::is_same_v<G, Acc>;  // products read rows of G without packing
  // The stride of packed rows that are read down a column: an odd number of cache lines, so that rows fall into different sets.
  static constexpr int64_t kTransposedStride = kHeadSpan + 64 / size;

  explicit Head(const LinearHead& args) : Rows{args} {}

  static VEC_INLINE int64_t steps_of(int64_t n) { return round_up(n, depth) / step; }  // how many elements hold n indices of k
  int64_t row_steps() const {
    const int64_t lines = round_up(steps_of(a.d) * size, 64) / 64;
    return (lines | 1) * 64 / size;
  }
  int64_t columns() const { return round_up(a.d, lanes); }
  const T* weight(int64_t row) const { return static_cast<const T*>(a.weight) + row * a.weight_stride; }
  int64_t span_width(int64_t span) const { return lesser(kHeadSpan, a.vocab - span * kHeadSpan); }

  // Whether an element is a pair and d is odd. The last number of a row then has no partner, and rows are copied with a 0 after
  // it.
  bool odd() const { return step == 2 && a.d % 2 != 0; }
  static VEC_INLINE void copy_even(const T* from, int64_t n, T* to) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
    if (n % 2 != 0) std::memset(to + n, 0, sizeof(T));
  }

  // -------------------------------------------------------------------------------------------------------- scratch
  struct ScoreScratch {
    E* w;         // [steps][kHeadBlock]
    Acc* sums;    // [strips][levels][kStrip][kHeadBlock]; one strip where W is packed for all of k at once
    T* even;      // [kHeadBlock][kSteps * step]
    int64_t allocate(void* memory, const Head& h) {
      Arena c(memory);
      c.take(w, lesser(kSteps, round_up(steps_of(h.a.d), 16)) * kHeadBlock);
      c.take(sums, (steps_of(h.a.d) <= kSteps ? 1 : Sums::strips(h.a.capacity)) * h.sums().levels() * Sums::kLevel);
      c.take(even, h.odd() ? kHeadBlock * kSteps * step : 0);
      return c.bytes;
    }
  };
  struct WeightScratch {
    E* steps;      // G packed as steps of k
    E* g;          // from `steps`, A of dW: [strips][steps][kStrip], or for AMX tiles [kHeadSpan][steps]
    Acc* edge;     // [kHeadSpan][kPanel]: the last columns of dW, where d is no multiple of a vector
    Acc* sum;      // [kHeadSpan][d]: sums of dW
    int64_t allocate(void* memory, const Head& h) {
      Arena c(memory);
      c.take(steps, kTiles<P> ? 0 : steps_of(h.a.capacity) * kTransposedStride);
      c.take(g, kTiles<P> ? kHeadSpan * h.transposed_steps() : steps_of(h.a.capacity) * kHeadSpan);
      c.take(edge, h.a.d % lanes != 0 ? kHeadSpan * kPanel<P> : 0);
      c.take(sum, h.a.dweight_sum == nullptr && h.a.dweight != nullptr ? kHeadSpan * h.a.d : 0);
      return c.bytes;
    }
  };
  struct HiddenScratch {
    E* w;       // [panels][steps of a span][kPanel]: packed rows of the weight, B of dhidden
    Acc* sum;   // [capacity][kHeadColumns]: sums of dhidden
    E* g;       // [capacity][kHeadSpan]: packed G, where !in_place
    int64_t allocate(void* memory, const Head& h) {
      Arena c(memory);
      c.take(w, steps_of(kHeadSpan) * kHeadColumns);
      c.take(sum, h.a.capacity * kHeadColumns);
      c.take(g, in_place ? 0 : h.a.capacity * kTransposedStride);
      return c.bytes;
    }
  };
  int64_t transposed_steps() const { return ((steps_of(a.capacity) * size / 64) | 1) * 64 / size; }

  HeadSizes sizes() const {
    constexpr int64_t budget = 1056;  // the most bytes of a chunk's scores for each column of the vocabulary
    const int64_t stored = a.store == HeadStore::exponentials || (a.store == HeadStore::gradient && is_bf16<T>)
                               ? int64_t{2} : static_cast<int64_t>(sizeof(Acc));
    const int64_t spans = (a.vocab + kHeadSpan - 1) / kHeadSpan;
    int64_t scratch = ScoreScratch().allocate(nullptr, *this);
    if (a.store != HeadStore::none) {
      const int64_t weight = WeightScratch().allocate(nullptr, *this), hidden = HiddenScratch().allocate(nullptr, *this);
      scratch = scratch > weight ? scratch : weight;
      scratch = scratch > hidden ? scratch : hidden;
    }
    return {budget / stored, 2 * budget / static_cast<int64_t>(sizeof(Acc)), a.capacity * row_steps() * size,
            steps_of(a.capacity) * columns() * size,
            a.store == HeadStore::none ? 0 : spans * kHeadSpan * a.capacity * stored, scratch,
            (columns() + kPanel<P> - 1) / kPanel<P>};
  }

  // ------------------------------------------------------------------------------------------------- packing of hidden
  const T* hidden(int64_t row) const { return static_cast<const T*>(a.hidden) + row * a.hidden_stride; }

  void pack(int64_t tile) const {
    const int64_t rows = (a.rows + kHeadPackRows - 1) / kHeadPackRows;
    if (tile >= rows) {
      const int64_t j = (tile - rows) * kPanel<P>;
      return pack_steps<P>(a.rows, lesser(kPanel<P>, a.d - j), [&](int64_t i) VEC_LAMBDA { return hidden(i) + j; },
                           static_cast<E*>(a.hidden_steps) + j * steps_of(a.rows), lesser(kPanel<P>, columns() - j));
    }
    E* to = static_cast<E*>(a.hidden_rows);
    for (int64_t i = tile * kHeadPackRows; i < lesser((tile + 1) * kHeadPackRows, a.rows); ++i) {
      E* out = to + i * row_steps();
      if (odd()) {  // a row padded to even length is an operand as it is
        copy_even(hidden(i), a.d, reinterpret_cast<T*>(out));
        if constexpr (kTiles<P>) std::memset(out + (a.d + 1) / 2, 0, (steps_of(a.d) - (a.d + 1) / 2) * size);
      } else {
        pack_rows<P>(1, a.d, [&](int64_t) VEC_LAMBDA { return hidden(i); }, out, row_steps());
      }
    }
  }

  // ----------------------------------------------------------------------------------------------------------- scores
  // C = m rows of A times n lanes of B [k][b_stride], combined with what C holds as `start` says.
  template <Start start>
  static VEC_INLINE void multiply(const void* rows, int64_t row_bytes, int64_t step_bytes, int64_t m, const E* b,
                                  int64_t b_stride, int64_t n, int64_t k, Acc* c, int64_t c_stride) {
    for (int64_t i = 0; i < m; i += kStrip) {
      const int64_t strip = lesser(kStrip, m - i);
      // C is needed when the accumulation ends, and is prefetched before it begins.
      for (int64_t r = i; r < i + strip; ++r) {
        for (int64_t j = 0; j < n; j += 64 / static_cast<int64_t>(sizeof(Acc))) {
          _mm_prefetch(reinterpret_cast<const char*>(c + r * c_stride + j), _MM_HINT_T0);
        }
      }
      product<P, start>({static_cast<const char*>(rows) + i * row_bytes, row_bytes, step_bytes, b, b_stride, kPanel<P>,
                         c + i * c_stride, c_stride, strip, k, 0, n});
    }
  }
  static VEC_INLINE void multiply(bool fresh, const void* rows, int64_t row_bytes, int64_t step_bytes, int64_t m,
                                  const E* b, int64_t b_stride, int64_t n, int64_t k, Acc* c, int64_t c_stride) {
    if (fresh) multiply<Start::zero>(rows, row_bytes, step_bytes, m, b, b_stride, n, k, c, c_stride);
    else multiply<Start::separate>(rows, row_bytes, step_bytes, m, b, b_stride, n, k, c, c_stride);
  }

  Sums sums() const { return {a.d, linear_piece(a.d, linear_pieces(a.d)), true}; }

  void scores(int64_t block, void* scratch) const {
    ScoreScratch w;
    w.allocate(scratch, *this);
    const int64_t first = block * kHeadBlock, count = lesser(kHeadBlock, a.vocab - first);
    const int64_t n = round_up(count, lanes), strips = Sums::strips(a.rows), each = sums().levels() * Sums::kLevel;
    for (int64_t k = 0; k < a.d; k += kSteps * step) {
      const int64_t d = lesser(kSteps * step, a.d - k);
      Chain chains[Sums::kChains];
      const int64_t chain_count = sums().chains(k, k + d, chains);
      if (odd()) {
        for (int64_t i = 0; i < count; ++i) copy_even(weight(first + i) + k, d, w.even + i * kSteps * step);
        pack_lanes<P>(count, d + d % 2, [&](int64_t i) VEC_LAMBDA { return w.even + i * kSteps * step; }, w.w, kHeadBlock);
      } else {
        pack_lanes<P>(count, d, [&](int64_t i) VEC_LAMBDA { return weight(first + i) + k; }, w.w, kHeadBlock);
      }
      for (int64_t i = 0; i < strips; ++i) {
        const int64_t row = Sums::strip_begin(i, a.rows), end = Sums::strip_begin(i + 1, a.rows);
        Acc* levels = w.sums + (d == a.d ? 0 : i * each);
        const E* rows = static_cast<const E*>(a.hidden_rows) + row * row_steps() + k / step;
        Sums::multiply(reinterpret_cast<const char*>(rows), row_steps() * size, end - row, w.w, n, chains, chain_count, levels);
        if (k + d < a.d) continue;
        sums().finish(levels);
        for (int64_t t = row; t < end; ++t) this->finish_scores(t, block, count, levels + (t - row) * kHeadBlock);
      }
    }
  }

  // ---------------------------------------------------------------------------------------------------------- dweight
  void dweight(int64_t span, void* scratch) const {
    const int64_t first = span * kHeadSpan, count = span_width(span), steps = steps_of(a.rows);
    if (a.store != HeadStore::gradient) this->form_gradient(span, count);
    if (a.dweight == nullptr && a.dweight_sum == nullptr) return;
    WeightScratch w;
    w.allocate(scratch, *this);
    pack_gradient(span, count, w);

    Acc* sum = a.dweight_sum ? static_cast<Acc*>(a.dweight_sum) + first * a.d : w.sum;
    for (int64_t j = 0; j < a.d; j += kPanel<P>) {
      const E* b = static_cast<const E*>(a.hidden_steps) + j * steps;
      const int64_t width = lesser(kPanel<P>, a.d - j), n = round_up(width, lanes);
      if (width == n) {
        multiply_columns(w, count, b, n, steps, sum + j, a.d);
        continue;
      }
      if (!a.fresh) copy_columns(sum + j, a.d, count, width, w.edge, kPanel<P>);
      multiply_columns(w, count, b, n, steps, w.edge, kPanel<P>);
      copy_columns(w.edge, kPanel<P>, count, width, sum + j, a.d);
    }
    if (a.last && a.dweight != nullptr) write(a.dweight_dtype, sum, a.d, count, a.d, a.dweight, first * a.d);
  }

  // Packs G as A of dW: the columns of G become rows of A, and kStrip of these (a strip) are interleaved, except for AMX tiles.
  void pack_gradient(int64_t span, int64_t count, const WeightScratch& w) const {
    const auto row = [&](int64_t t) VEC_LAMBDA { return this->gradient_row(t, span); };
    if constexpr (kTiles<P>) {
      pack_steps_transposed<P>(a.rows, count, row, w.g, transposed_steps());
    } else {
      pack_steps<P>(a.rows, count, row, w.steps, kTransposedStride);
      for (int64_t k = 0, steps = steps_of(a.rows); k < steps; ++k) {
        for (int64_t i = 0; i < count; i += kStrip) {
          std::memcpy(w.g + i * steps + k * kStrip, w.steps + k * kTransposedStride + i, kStrip * size);
        }
      }
    }
  }
  VEC_INLINE void multiply_columns(const WeightScratch& w, int64_t count, const E* b, int64_t n, int64_t steps, Acc* c,
                                   int64_t stride) const {
    if constexpr (kTiles<P>) {
      multiply(a.fresh, w.g, transposed_steps() * size, size, count, b, n, n, steps, c, stride);
    } else {
      for (int64_t i = 0; i < count; i += kStrip) {
        multiply(a.fresh, w.g + i * steps, size, kStrip * size, lesser(kStrip, count - i), b, n, n, steps, c + i * stride,
                 stride);
      }
    }
  }

  static void copy_columns(const Acc* from, int64_t from_stride, int64_t rows, int64_t columns, Acc* to, int64_t to_stride) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(to + i * to_stride, from + i * from_stride, static_cast<size_t>(columns) * sizeof(Acc));
    }
  }

  // Writes sums to the rows of a result, [..][a.d] from element `at` on, in its dtype: the accumulator's or T.
  void write(Dtype dtype, const Acc* sum, int64_t stride, int64_t rows, int64_t columns, void* out, int64_t at) const {
    const auto each = [&](auto* to) {
      for (int64_t i = 0; i < rows; ++i) {
        for_vectors<V, Single>(columns, [&](int64_t j, auto part) VEC_LAMBDA {
          store(to + i * a.d + j, load<V>(sum + i * stride + j, part), part);
        });
      }
    };
    if (dtype == a.dtype) each(static_cast<T*>(out) + at);
    else each(static_cast<Acc*>(out) + at);
  }

  // ---------------------------------------------------------------------------------------------------------- dhidden
  // Returns G of rows [r, r + m) in a span as rows of A, packed into `packed` unless in_place.
  const void* gradient_operand(int64_t span, int64_t r, int64_t m, int64_t count, E* packed, int64_t& row_bytes) const {
    if constexpr (in_place) {
      row_bytes = this->gradient_bytes();
      return this->gradient_row(r, span);
    } else {
      row_bytes = kTransposedStride * size;
      pack_rows<P>(m, count, [&](int64_t t) VEC_LAMBDA { return this->gradient_row(r + t, span); }, packed, kTransposedStride);
      return packed;
    }
  }

  void dhidden(int64_t tile, void* scratch) const {
    const int64_t across = (a.d + a.dhidden_columns - 1) / a.dhidden_columns;
    const int64_t r = tile / across * a.dhidden_rows, m = lesser(a.dhidden_rows, a.rows - r);
    const int64_t column = tile % across * a.dhidden_columns, wide = lesser(a.dhidden_columns, a.d - column);
    HiddenScratch w;
    w.allocate(scratch, *this);
    const int64_t spans = (a.vocab + kHeadSpan - 1) / kHeadSpan;
    for (int64_t span = 0; span < spans; ++span) {
      const int64_t count = span_width(span), steps = steps_of(count);
      int64_t row_bytes;
      const void* g = gradient_operand(span, r, m, count, w.g, row_bytes);
      for (int64_t j = 0; j < wide; j += kPanel<P>) {
        const int64_t width = lesser(kPanel<P>, wide - j), n = round_up(width, lanes);
        E* b = w.w + j * steps;
        pack_steps<P>(count, width, [&](int64_t i) VEC_LAMBDA { return weight(span * kHeadSpan + i) + column + j; }, b, n);
        multiply(span == 0, g, row_bytes, size, m, b, n, n, steps, w.sum + j, kHeadColumns);
      }
    }
    write(a.dhidden_dtype, w.sum, kHeadColumns, m, wide, a.dhidden, r * a.d + column);
  }
};

}  // namespace

HeadSizes linear_head_sizes(const LinearHead& a) {
  WITH_STORAGE(a.dtype, T, { return Head<T>(a).sizes(); })
  return {};
}

void linear_head_step(const LinearHead& a, HeadStep step, int64_t tile, void* scratch) {
  begin_tiles();
  WITH_STORAGE(a.dtype, T, {
    const Head<T> head(a);
    switch (step) {
      case HeadStep::pack: head.pack(tile); break;
      case HeadStep::scores: head.scores(tile, scratch); break;
      case HeadStep::merge: head.merge(kHeadMergeRows * tile, lesser(kHeadMergeRows * (tile + 1), a.rows)); break;
      case HeadStep::dweight: head.dweight(tile, scratch); break;
      case HeadStep::dhidden: head.dhidden(tile, scratch); break;
    }
  })
  end_tiles();
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
