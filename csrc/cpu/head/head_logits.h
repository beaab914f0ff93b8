// What linear_head.cpp computes between its matrix products: the statistics of a block of logits, their merge into lse and
// entropy, and the gradient of the logits.
#pragma once
#include "../../linear_head.h"
#include "../dispatch.h"
#include "../simd/math.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr double kInfinity = __builtin_huge_val();

// Bit i is set where lane i of a equals lane i of b.
#if defined(CPU_CAPABILITY_AVX512)
VEC_INLINE unsigned equal_lanes(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
VEC_INLINE unsigned equal_lanes(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ); }
#else
VEC_INLINE unsigned equal_lanes(Vec<float> a, Vec<float> b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)));
}
VEC_INLINE unsigned equal_lanes(Vec<double> a, Vec<double> b) {
  return static_cast<unsigned>(_mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)));
}
#endif

template <typename T> struct HeadRows {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  using G = std::conditional_t<is_bf16<T>, bf16, Acc>;  // the type in which gradients of logits are stored
  static constexpr int64_t lanes = V::size, kBlocks = kHeadSpan / kHeadBlock;
  // The sum of exponentials has 64 bytes of lanes on every instruction set, and with them the same bits.
  static constexpr int64_t kSums = 64 / (lanes * static_cast<int64_t>(sizeof(Acc)));

  const LinearHead& a;

  int64_t gradient_bytes() const {  // bytes of a row of scores; the gradient is stored at its beginning
    const bool wide = a.store == HeadStore::logits;
    return kHeadSpan * static_cast<int64_t>(wide ? sizeof(Acc) : sizeof(G));
  }
  char* scores_row(int64_t t, int64_t span) const {
    return static_cast<char*>(a.scores) + (span * a.capacity + t) * gradient_bytes();
  }
  G* gradient_row(int64_t t, int64_t span) const { return reinterpret_cast<G*>(scores_row(t, span)); }
  Acc& at(void* p, int64_t t) const { return static_cast<Acc*>(p)[t]; }
  Acc at(const void* p, int64_t t) const { return static_cast<const Acc*>(p)[t]; }

  // ----------------------------------------------------------------------------------------------- a block of logits
  // Turns the products x of row t into logits, with -inf beyond the end of the vocabulary, computes their statistics, and
  // stores what a.store says.
  VEC_INLINE void finish_scores(int64_t t, int64_t block, int64_t count, Acc* x) const {
    const V scale(static_cast<Acc>(a.scale)), cap(static_cast<Acc>(a.softcap)), inverse(static_cast<Acc>(1 / a.softcap));
    if (a.softcap > 0) {
      for (int64_t j = 0; j < kHeadBlock; j += lanes) (cap * tanh(V::load(x + j) * scale * inverse)).store(x + j);
    } else if (a.scale != 1) {
      for (int64_t j = 0; j < kHeadBlock; j += lanes) (V::load(x + j) * scale).store(x + j);
    }
    for (int64_t j = count; j < kHeadBlock; ++j) x[j] = static_cast<Acc>(-kInfinity);
    const int64_t label = a.label[t] - block * kHeadBlock;
    const bool here = label >= 0 && label < count;
    if (here && a.label_logit != nullptr) at(a.label_logit, t) = x[label];

    const int64_t span = block / kBlocks, column = block % kBlocks * kHeadBlock;
    if (a.store == HeadStore::gradient) {
      G* out = gradient_row(t, span) + column;
      from_logits(t, x, count, kHeadBlock, out);
      if (here && !idle(t)) put(out + label, label_gradient(t, x[label]));
      return;
    }
    bf16* exponentials = nullptr;
    if (a.store == HeadStore::exponentials) exponentials = reinterpret_cast<bf16*>(scores_row(t, span)) + column;
    if (a.store == HeadStore::logits) {
      std::memcpy(reinterpret_cast<Acc*>(scores_row(t, span)) + column, x, kHeadBlock * sizeof(Acc));
    }
    statistics(block * a.capacity + t, x, count, exponentials);
  }

  VEC_INLINE void statistics(int64_t to, const Acc* x, int64_t count, bf16* exponentials) const {
    V most = V::load(x);
    for (int64_t j = lanes; j < kHeadBlock; j += lanes) most = max(most, V::load(x + j));
    const Acc m = largest(most);
    const V shift(m == static_cast<Acc>(-kInfinity) ? Acc(0) : m);
    V sums[kSums] = {}, dot(Acc(0));
    for (int64_t j = 0; j < kHeadBlock; j += lanes) {
      const V d = V::load(x + j) - shift, e = exp(d);
      V& sum = sums[j / lanes % kSums];
      sum = sum + e;
      if (a.block_dot != nullptr) dot = fma(e, max(V(Acc(-1000)), d), dot);  // d is bounded, because 0 * -inf would be NaN
      if constexpr (sizeof(Acc) == 4) {
        if (exponentials != nullptr) e.store(exponentials + j);
      }
    }
    at(a.block_max, to) = m;
    at(a.block_sum, to) = (kSums == 2 ? sums[0] + sums[kSums - 1] : sums[0]).sum();
    if (a.block_dot != nullptr) at(a.block_dot, to) = dot.sum();
    if (a.block_total != nullptr) at(a.block_total, to) = total(x, count);
    if (a.block_best != nullptr) a.block_best[to] = first_equal(x, m);
  }
  static VEC_INLINE Acc total(const Acc* x, int64_t count) {
    V sum(Acc(0));
    const int64_t whole = count / lanes * lanes;
    for (int64_t j = 0; j < whole; j += lanes) sum = sum + V::load(x + j);
    if (whole < count) sum = sum + V::load(x + whole, static_cast<int>(count - whole));
    return sum.sum();
  }
  static VEC_INLINE int32_t first_equal(const Acc* x, Acc m) {
    for (int64_t j = 0; j < kHeadBlock; j += lanes) {
      const unsigned equal = equal_lanes(V::load(x + j), V(m));
      if (equal != 0) return static_cast<int32_t>(j) + __builtin_ctz(equal);
    }
    return 0;
  }

  // ------------------------------------------------------------------------------------------------------------ merge
  // Merges the statistics of rows [begin, end) of the chunk. A lane of a vector is a row; blocks are merged in rising order.
  void merge(int64_t begin, int64_t end) const {
    const int64_t blocks = (a.vocab + kHeadBlock - 1) / kHeadBlock;
    for (int64_t t = begin; t < end; t += lanes) {
      const int n = static_cast<int>(end - t < lanes ? end - t : lanes);
      V most(static_cast<Acc>(-kInfinity));
      for (int64_t b = 0; b < blocks; ++b) most = max(most, part(a.block_max, b, t));
      alignas(64) Acc shift[lanes], logs[lanes];
      most.store(shift);
      for (Acc& s : shift) s = s == static_cast<Acc>(-kInfinity) ? Acc(0) : s;
      V sum(Acc(0)), rest(Acc(0));
      for (int64_t b = 0; b < blocks; ++b) {  // a compensated sum: `rest` is the rounding error of the addition before
        const V term = fma(part(a.block_sum, b, t), exp(part(a.block_max, b, t) - V::load(shift)), rest);
        const V next = sum + term;
        rest = term - (next - sum);
        sum = next;
      }
      sum.store(logs);
      for (Acc& s : logs) s = log_of(s);
      most.store(&at(a.top, t), n);
      V::load(logs).store(&at(a.log_sum, t), n);
      if (a.entropy != nullptr) entropy(t, blocks, V::load(shift), V::load(logs)).store(&at(a.entropy, t), n);
      if (a.total != nullptr) {
        V all(Acc(0));
        for (int64_t b = 0; b < blocks; ++b) all = all + part(a.block_total, b, t);
        all.store(&at(a.total, t), n);
      }
      if (a.best != nullptr) {
        for (int i = 0; i < n; ++i) best(t + i, blocks);
      }
    }
  }
  VEC_INLINE V part(const void* statistic, int64_t block, int64_t t) const {
    return V::load(static_cast<const Acc*>(statistic) + block * a.capacity + t);
  }
  // The entropy sum_j p_j (lse - l_j). It is the sum over blocks of exp(m - lse) ((lse - m) sum - dot), where m, sum and dot
  // are the block's block_max, block_sum and block_dot; no term is negative. lse is given as two numbers, shift + log, because
  // the rounding of their sum would enter the entropy.
  VEC_INLINE V entropy(int64_t t, int64_t blocks, V shift, V log) const {
    const V least(static_cast<Acc>(sizeof(Acc) == 4 ? -1e38 : -1e300));  // a block of nothing but -inf gives 0 and not NaN
    V sum(Acc(0)), rest(Acc(0));
    for (int64_t b = 0; b < blocks; ++b) {
      const V m = part(a.block_max, b, t);
      const V ahead = (shift - max(least, m)) + log;  // lse - m
      const V inner = ahead * part(a.block_sum, b, t) - part(a.block_dot, b, t);
      const V term = fma(exp(V(0) - ahead), inner, rest), next = sum + term;
      rest = term - (next - sum);
      sum = next;
    }
    return sum;
  }
  void best(int64_t t, int64_t blocks) const {
    int64_t found = 0;
    for (int64_t b = 1; b < blocks; ++b) {
      if (at(a.block_max, b * a.capacity + t) > at(a.block_max, found * a.capacity + t)) found = b;
    }
    at(a.best, t) = at(a.block_max, found * a.capacity + t);
    a.best_column[t] = static_cast<int32_t>(found * kHeadBlock) + a.block_best[found * a.capacity + t];
  }

  // --------------------------------------------------------------------------------------------------------- gradient
  bool idle(int64_t t) const { return at(a.a, t) == 0 && at(a.b, t) == 0 && at(a.s, t) == 0 && at(a.k, t) == 0; }
  static VEC_INLINE void put(G* to, Acc value) { V(value).store(to, 1); }
  Acc slope(Acc l) const {
    const Acc u = l * static_cast<Acc>(1 / a.softcap);
    return 1 - u * u;
  }
  // The gradient of the label's logit l. p - 1 comes from expm1, so that nothing cancels where the label's probability p is
  // close to 1.
  Acc label_gradient(int64_t t, Acc l) const {
    const Acc d = (l - at(a.top, t)) - at(a.log_sum, t), x = expm1_of(d);
    Acc g = at(a.a, t) * x + at(a.k, t) + at(a.s, t);
    if (at(a.b, t) != 0) g += at(a.b, t) * (x + 1) * (d < -1000 ? -1000 : d);
    return a.softcap > 0 ? g * slope(l) : g;
  }
  // Writes the gradient of the logits x of row t as if none were the label's: `count` columns, and 0 up to column `all`. `out`
  // may be the memory of x.
  VEC_INLINE void from_logits(int64_t t, const Acc* x, int64_t count, int64_t all, G* out) const {
    if (idle(t)) return static_cast<void>(std::memset(static_cast<void*>(out), 0, static_cast<size_t>(all) * sizeof(G)));
    const V top(at(a.top, t)), log_sum(at(a.log_sum, t)), va(at(a.a, t)), vb(at(a.b, t)), vs(at(a.s, t)), one(Acc(1));
    const V inverse(static_cast<Acc>(1 / a.softcap));
    const bool logs = at(a.b, t) != 0, capped = a.softcap > 0;
    for (int64_t j = 0; j < all; j += lanes) {
      const V l = V::load(x + j), d = (l - top) - log_sum, p = exp(d);
      V g = logs ? fma(p, fma(vb, max(V(Acc(-1000)), d), va), vs) : fma(p, va, vs);
      if (capped) {
        const V u = l * inverse;
        g = g * fnma(u, u, one);
      }
      g.store(out + j);
    }
    clear(out, count, all);
  }
  static VEC_INLINE void clear(G* out, int64_t from, int64_t to) {
    if (from < to) std::memset(static_cast<void*>(out + from), 0, static_cast<size_t>(to - from) * sizeof(G));
  }

  // Turns the exponentials or logits that were stored of a span into the gradient, in place.
  void form_gradient(int64_t span, int64_t count) const {
    const int64_t all = (count + kHeadBlock - 1) / kHeadBlock * kHeadBlock;
    alignas(64) Acc factor[kBlocks * lanes];
    for (int64_t t = 0; t < a.rows; ++t) {
      G* row = gradient_row(t, span);
      if (a.store == HeadStore::logits) {
        from_logits(t, reinterpret_cast<const Acc*>(row), count, all, row);
      } else {
        if (t % lanes == 0) factors(t, span, all / kHeadBlock, factor);
        from_exponentials(t, factor + t % lanes, count, all, row);
      }
      const int64_t label = a.label[t] - span * kHeadSpan;
      if (label >= 0 && label < count && !idle(t)) put(row + label, label_gradient(t, at(a.label_logit, t)));
    }
  }
  // factor[b * lanes + i] = exp(largest logit of the span's block b - lse) of row t + i. A stored exponential times it is p.
  VEC_INLINE void factors(int64_t t, int64_t span, int64_t blocks, Acc* factor) const {
    const int n = static_cast<int>(a.rows - t < lanes ? a.rows - t : lanes);
    const V top = V::load(static_cast<const Acc*>(a.top) + t, n), log_sum = V::load(static_cast<const Acc*>(a.log_sum) + t, n);
    for (int64_t b = 0; b < blocks; ++b) {
      exp((part(a.block_max, span * kBlocks + b, t) - top) - log_sum).store(factor + b * lanes);
    }
  }
  VEC_INLINE void from_exponentials(int64_t t, const Acc* factor, int64_t count, int64_t all, G* row) const {
    if (idle(t)) return static_cast<void>(std::memset(static_cast<void*>(row), 0, static_cast<size_t>(all) * sizeof(G)));
    const V vs(at(a.s, t));
    for (int64_t j = 0; j < all; j += kHeadBlock) {
      const V va(at(a.a, t) * factor[j / kHeadBlock * lanes]);
      for (int64_t i = j; i < j + kHeadBlock; i += lanes) fma(V::load(row + i), va, vs).store(row + i);
    }
    clear(row, count, all);
  }
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
