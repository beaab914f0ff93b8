#include "../cross_entropy.h"

#include "dispatch.h"
#include "simd/math.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

constexpr double kInfinity = __builtin_huge_val();
constexpr int64_t kBlock = 1024;  // elements of a row that are read for their maximum and then, from the cache, for their sum

template <typename V> VEC_INLINE Two<V> largest_of(Two<V> x, Two<V> y) { return {max(x.a, y.a), max(x.b, y.b)}; }
template <typename V> VEC_INLINE Two<V> largest_of(Two<V> x, V y) { return {max(x.a, y), x.b}; }
template <typename V> VEC_INLINE Two<V> plus(Two<V> x, Two<V> y) { return {x.a + y.a, x.b + y.b}; }
template <typename V> VEC_INLINE Two<V> plus(Two<V> x, V y) { return {x.a + y, x.b}; }
template <typename V> VEC_INLINE Two<V> fma(Two<V> x, V y, V z) { return {fma(x.a, y, z), fma(x.b, y, z)}; }
template <typename V> VEC_INLINE Two<V> tanh(Two<V> x) { return {tanh(x.a), tanh(x.b)}; }

// One row of logits. The order of its sums depends on its length alone.
template <typename T> struct Row {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;

  const CrossEntropy& a;
  const T* x;
  Acc cap, inverse;

  Row(const CrossEntropy& args, int64_t t)
      : a(args), x(static_cast<const T*>(args.logits) + t * args.stride), cap(static_cast<Acc>(args.softcap)),
        inverse(static_cast<Acc>(1 / args.softcap)) {}

  VEC_INLINE Acc capped(Acc l) const { return a.softcap > 0 ? lane(V(cap) * tanh(V(l) * V(inverse))) : l; }
  // less: the soft-capped logits minus `shift`. slope: the derivative of the soft-cap there, 1 - tanh^2.
  template <typename L> struct Capped { L less, slope; };
  VEC_INLINE Capped<V> capped_less(V l, V shift) const {
    const V u = tanh(l * V(inverse));
    return {V(cap) * u - shift, fnma(u, u, V(Acc(1)))};
  }
  VEC_INLINE Capped<Two<V>> capped_less(Two<V> l, V shift) const {
    const auto first = capped_less(l.a, shift), second = capped_less(l.b, shift);
    return {{first.less, second.less}, {first.slope, second.slope}};
  }
  // l with -inf in the lanes beyond the end of the row, where l is a partial vector (N is int, and n its number of lanes).
  template <typename L, typename N> static VEC_INLINE L ended(L l, N n) {
    if constexpr (std::is_same_v<N, int>) {
      Acc lanes[V::size];
      l.store(lanes);
      for (int u = n; u < V::size; ++u) lanes[u] = static_cast<Acc>(-kInfinity);
      return V::load(lanes);
    } else {
      return l;
    }
  }
  template <typename N> VEC_INLINE auto logits(int64_t i, N n) const {
    const auto l = load<V>(x + i, n);
    return a.softcap > 0 ? V(cap) * tanh(l * V(inverse)) : l;
  }

  struct Lse { Acc top, log_sum; };  // the largest logit, and the log of the sum of exp(l - top)
  struct Sums { Lse lse; Acc total; };
  Sums sums() const {
    Two<V> sum{V(Acc(0)), V(Acc(0))}, total = sum;
    Acc most = static_cast<Acc>(-kInfinity);
    for (int64_t first = 0; first < a.cols; first += kBlock) {
      const int64_t n = a.cols - first < kBlock ? a.cols - first : kBlock;
      const Acc top = capped(block_max(first, n));
      if (!(top <= most)) {  // true for a NaN too, which becomes the maximum
        const Acc before = most;
        most = top;
        const V less(before == static_cast<Acc>(-kInfinity) ? Acc(0) : lane(exp(V(before - top))));
        sum = {sum.a * less, sum.b * less};
      }
      const Acc shift = most == static_cast<Acc>(-kInfinity) ? Acc(0) : most;
      sum = plus(sum, a.softcap > 0 ? block_sum<true>(first, n, shift) : block_sum<false>(first, n, shift));
      if (a.total != nullptr) total = plus(total, block_total(first, n));
    }
    return {{most, log_of((sum.a + sum.b).sum())}, (total.a + total.b).sum()};
  }
  static VEC_INLINE Acc lane(V x) {
    Acc lanes[V::size];
    x.store(lanes);
    return lanes[0];
  }

  VEC_INLINE Acc block_max(int64_t first, int64_t n) const {
    const V none(static_cast<Acc>(-kInfinity));
    Two<V> most[2] = {{none, none}, {none, none}};
    for_unrolled<2, V, T>(n, [&](int64_t i, auto part, int u) VEC_LAMBDA {
      most[u] = largest_of(most[u], ended(load<V>(x + first + i, part), part));
    });
    return largest(max(max(most[0].a, most[0].b), max(most[1].a, most[1].b)));
  }
  template <bool kCapped> VEC_INLINE Two<V> block_sum(int64_t first, int64_t n, Acc shift) const {
    const V zero(Acc(0)), down(shift);
    Two<V> sum[2] = {{zero, zero}, {zero, zero}};
    for_unrolled<2, V, T>(n, [&](int64_t i, auto part, int u) VEC_LAMBDA {
      const auto l = load<V>(x + first + i, part);
      if constexpr (kCapped) sum[u] = plus(sum[u], exp(ended(capped_less(l, down).less, part)));
      else sum[u] = plus(sum[u], exp(ended(l - down, part)));
    });
    return plus(sum[0], sum[1]);
  }
  VEC_INLINE Two<V> block_total(int64_t first, int64_t n) const {
    const V zero(Acc(0));
    Two<V> sum{zero, zero};
    for_vectors<V, T>(n, [&](int64_t i, auto part) VEC_LAMBDA { sum = plus(sum, logits(first + i, part)); });  // 0 past the end
    return sum;
  }

  // exp(d), only as exact as a result of type T needs.
  template <typename X> static VEC_INLINE X exp_for_result(X d) {
    if constexpr (sizeof(T) == 2) return exp2_for_16_bits(d * V(Acc(1.4426950408889634)));
    else return exp(d);
  }
  void gradient(Lse lse, int64_t label, double r, T* out) const {
    if (r == 0) return static_cast<void>(std::memset(static_cast<void*>(out), 0, static_cast<size_t>(a.cols) * sizeof(T)));
    const double log_sum = lse.log_sum, slope = 2 * a.z_loss * (lse.top + log_sum), factor = r * (1 + slope);
    const Acc fa = static_cast<Acc>(factor), fk = static_cast<Acc>(r * (slope + a.label_smoothing));
    const Acc fs = static_cast<Acc>(-r * a.label_smoothing / static_cast<double>(a.cols));
    const Acc logit = to_acc(x[label]);
    Capped<Acc> l{logit - lse.top, Acc(1)};
    if (a.softcap > 0) {
      const auto lanes = capped_less(V(logit), V(lse.top));
      l = {lane(lanes.less), lane(lanes.slope)};
    }
    const Acc g = (fa * expm1_of(l.less - lse.log_sum) + fk + fs) * l.slope;  // expm1: p - 1 would cancel
    gradient_part(V(lse.top), static_cast<Acc>(factor * ::exp(-log_sum)), fs, out);
    V(g).store(out + label, 1);
  }
  // Writes the gradient of all columns as if none were the label's; the caller then overwrites the label's column.
  void gradient_part(V down, Acc fa, Acc fs, T* out) const {
    const V va(fa), vs(fs);
    if (a.softcap > 0) {
      for_vectors<V, T>(a.cols, [&](int64_t i, auto part) VEC_LAMBDA {
        const auto l = capped_less(load<V>(x + i, part), down);
        store(out + i, (exp_for_result(l.less) * va + vs) * l.slope, part);
      });
    } else {
      for_vectors<V, T>(a.cols, [&](int64_t i, auto part) VEC_LAMBDA {
        store(out + i, fma(exp_for_result(load<V>(x + i, part) - down), va, vs), part);
      });
    }
  }
};

template <typename T> void forward(const CrossEntropy& a, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  for (int64_t t = begin; t < end; ++t) {
    const Row<T> row(a, t);
    const auto sums = row.sums();
    const int64_t label = a.label[t];
    const Acc logit = label < 0 ? Acc(0) : row.capped(to_acc(row.x[label]));
    static_cast<typename Row<T>::Lse*>(a.lse)[t] = sums.lse;
    static_cast<Acc*>(a.label_logit)[t] = logit;
    if (a.total != nullptr) static_cast<Acc*>(a.total)[t] = sums.total;
    if (a.dlogits != nullptr) {
      row.gradient(sums.lse, label, a.factor[t], static_cast<T*>(a.dlogits) + t * a.dlogits_stride);
    }
  }
}

template <typename T> void backward(const CrossEntropy& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const Row<T> row(a, t);
    row.gradient(static_cast<const typename Row<T>::Lse*>(a.lse)[t], a.label[t], a.factor[t],
                 static_cast<T*>(a.dlogits) + t * a.dlogits_stride);
  }
}

template <typename From, typename To> void scale(const ScaleGradient& a, int64_t begin, int64_t end) {
  using V = Vec<acc_t<To>>;
  const V factor(static_cast<acc_t<To>>(a.factor));
  const From* in = static_cast<const From*>(a.in) + begin;
  To* out = static_cast<To*>(a.out) + begin;
  for_vectors<V, To>(end - begin, [&](int64_t i, auto n) VEC_LAMBDA { store(out + i, load<V>(in + i, n) * factor, n); });
}

}  // namespace

void cross_entropy_fwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, { forward<T>(a, begin, end); })
}

void cross_entropy_bwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, { backward<T>(a, begin, end); })
}

void scale_gradient(const ScaleGradient& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.to, T, {
    if (a.from == a.to) scale<T, T>(a, begin, end);
    else scale<acc_t<T>, T>(a, begin, end);
  })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
