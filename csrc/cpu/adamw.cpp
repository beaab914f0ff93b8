#include "../adamw.h"

#include <algorithm>

#include "elementwise.h"
#include "simd/philox.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

template <typename P, typename G, typename M> struct Pointers { P* param; const G* grad; acc_t<P>* master; M *m, *v; };

template <typename Acc> struct Constants {
  using V = Vec<Acc>;
  V factor, decay, beta1, rest1, beta2, rest2, root_scale, eps, step_size;
  Constants(const Adamw& a, const AdamwTensor& t)
      : factor(static_cast<Acc>(a.grad_factor)), decay(static_cast<Acc>(t.decay)), beta1(static_cast<Acc>(a.beta1)),
        rest1(static_cast<Acc>(1 - a.beta1)), beta2(static_cast<Acc>(a.beta2)), rest2(static_cast<Acc>(1 - a.beta2)),
        root_scale(static_cast<Acc>(t.root_scale)), eps(static_cast<Acc>(a.eps)), step_size(static_cast<Acc>(t.step_size)) {}
};

// Non-temporal stores, for parameters that are written and not read: an ordinary store would first fetch the lines into the
// cache.
#if defined(CPU_CAPABILITY_AVX512)
VEC_INLINE void store_nontemporal(bf16* p, Two<Vec<float>> x) {
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(x.a.to_bf16()), x.b.to_bf16(), 1);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
}
#else
VEC_INLINE void store_nontemporal(bf16* p, Two<Vec<float>> x) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), x.a.to_bf16());
  _mm_stream_si128(reinterpret_cast<__m128i*>(p) + 1, x.b.to_bf16());
}
#endif

template <typename V> VEC_INLINE Two<V> root(Two<V> x) { return {root(x.a), root(x.b)}; }

// A block is kPairs pairs of vectors: as many elements as get their random bits from one call of philox().
constexpr int kPairs = 2;

template <typename P, typename G, typename M, bool kMaster, bool kStochastic> struct Step {
  using Acc = acc_t<P>;
  using V = Vec<Acc>;
  static constexpr bool kRandom = kStochastic || is_bf16<M>;
  // The order of lanes in a pair of vectors (Both in simd/vec.h). philox() returns random bits for even and odd elements
  // separately, the order of Both<bf16>; without random bits the order of memory needs no shuffles.
  using Order = std::conditional_t<kRandom, bf16, Acc>;
  static constexpr int kElements = kPairs * 2 * V::size;
  static_assert(!kRandom || kElements == kPhiloxElements);

  const Constants<Acc> c;
  const PhiloxKey key;
  const uint32_t stream, step;  // stream: the parameter's random stream; exp_avg has stream + 1 and exp_avg_sq stream + 2

  Step(const Adamw& a, const AdamwTensor& t)
      : c(a, t), key(a.seed_low, a.seed_high), stream(t.index * 4), step(t.step) {}

  template <typename T> VEC_INLINE void put(T* p, const Two<V> (&x)[kPairs], int64_t, uint32_t) const {
    for (int k = 0; k < kPairs; ++k) store(p + k * 2 * V::size, x[k], Both<Order>{});
  }
  VEC_INLINE void put_random(bf16* p, const Two<V> (&x)[kPairs], int64_t element, uint32_t of) const {
    Words random[kPairs];
    philox(key, static_cast<uint64_t>(element) / 8, of, step, random[0], random[1]);
    for (int k = 0; k < kPairs; ++k) store_stochastic(p + k * 2 * V::size, x[k].a, x[k].b, random[k]);
  }

  // Whether stores of the parameter may be non-temporal.
  static constexpr bool kNontemporal = kMaster && is_bf16<P> && std::is_same_v<Order, float>;

  template <bool kPastCache = false> VEC_INLINE void block(const Pointers<P, G, M>& p, int64_t i, int64_t element) const {
    Two<V> w[kPairs], m[kPairs], v[kPairs];
    for (int k = 0; k < kPairs; ++k) {
      const int64_t j = i + k * 2 * V::size;
      const Two<V> g = load<V>(p.grad + j, Both<Order>{}) * c.factor;
      if constexpr (kMaster) w[k] = load<V>(p.master + j, Both<Order>{}) * c.decay;
      else w[k] = load<V>(p.param + j, Both<Order>{}) * c.decay;
      m[k] = fma(load<V>(p.m + j, Both<Order>{}), c.beta1, g * c.rest1);
      v[k] = fma(load<V>(p.v + j, Both<Order>{}), c.beta2, g * g * c.rest2);
      const Two<V> size = root(v[k]) * c.root_scale + c.eps;
      w[k] = fnma(m[k] / size, c.step_size, w[k]);
    }
    if constexpr (kMaster) put(p.master + i, w, element, 0);
    if constexpr (kStochastic) put_random(p.param + i, w, element, stream);
    else if constexpr (kPastCache) for (int k = 0; k < kPairs; ++k) store_nontemporal(p.param + i + k * 2 * V::size, w[k]);
    else put(p.param + i, w, element, 0);
    if constexpr (is_bf16<M>) {
      put_random(p.m + i, m, element, stream + 1);
      put_random(p.v + i, v, element, stream + 2);
    } else {
      put(p.m + i, m, element, 0);
      put(p.v + i, v, element, 0);
    }
  }

  // Updates elements [i, i + count) of the arrays by way of a copy of a whole block. They are elements [lead, lead + count) of
  // the block that begins at `element` of the unsharded tensor.
  void part(const Pointers<P, G, M>& p, int64_t i, int64_t count, int64_t lead, int64_t element) const {
    P param[kElements] = {};
    G grad[kElements] = {};
    Acc master[kMaster ? kElements : 1] = {};
    M m[kElements] = {}, v[kElements] = {};
    std::copy_n(p.param + i, count, param + lead);
    std::copy_n(p.grad + i, count, grad + lead);
    if constexpr (kMaster) std::copy_n(p.master + i, count, master + lead);
    std::copy_n(p.m + i, count, m + lead);
    std::copy_n(p.v + i, count, v + lead);
    block({param, grad, master, m, v}, 0, element);
    std::copy_n(param + lead, count, p.param + i);
    if constexpr (kMaster) std::copy_n(master + lead, count, p.master + i);
    std::copy_n(m + lead, count, p.m + i);
    std::copy_n(v + lead, count, p.v + i);
  }

  void range(const Pointers<P, G, M>& p, int64_t n, int64_t element) const {
    int64_t i = 0;
    const int64_t lead = kRandom ? element % 8 : 0;  // eight elements share a counter of Philox; a shard may begin among them
    if (lead != 0) {
      i = std::min(n, 8 - lead);
      part(p, 0, i, lead, element - lead);
    }
    if (kNontemporal && reinterpret_cast<uintptr_t>(p.param) % 64 == 0) {
      for (; i + kElements <= n; i += kElements) block<kNontemporal>(p, i, element + i);
      _mm_sfence();
    }
    for (; i + kElements <= n; i += kElements) block(p, i, element + i);
    if (i < n) part(p, i, n - i, 0, element + i);
  }
};

template <typename P, typename G, typename M>
void step_typed(const Adamw& a, const AdamwTensor& t, int64_t begin, int64_t end) {
  const Pointers<P, G, M> p{static_cast<P*>(t.param) + begin, static_cast<const G*>(t.grad) + begin,
                            t.master ? static_cast<acc_t<P>*>(t.master) + begin : nullptr, static_cast<M*>(t.exp_avg) + begin,
                            static_cast<M*>(t.exp_avg_sq) + begin};
  const int64_t n = end - begin, element = t.offset + begin;
  if (t.master != nullptr) return Step<P, G, M, true, false>(a, t).range(p, n, element);
  if constexpr (is_bf16<P>) {
    if (a.stochastic_rounding) return Step<P, G, M, false, true>(a, t).range(p, n, element);
  }
  Step<P, G, M, false, false>(a, t).range(p, n, element);
}

template <typename P, typename G>
void step_of_grad(const Adamw& a, const AdamwTensor& t, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<P, double>) return step_typed<P, G, double>(a, t, begin, end);
  else if (t.moment_dtype == Dtype::bf16) return step_typed<P, G, bf16>(a, t, begin, end);
  else return step_typed<P, G, float>(a, t, begin, end);
}

}  // namespace

void adamw_step(const Adamw& a, const AdamwTensor& t, int64_t begin, int64_t end) {
  WITH_STORAGE(t.dtype, P, {
    if (t.grad_dtype == t.dtype) return step_of_grad<P, P>(a, t, begin, end);
    if constexpr (sizeof(P) == 2) return step_of_grad<P, float>(a, t, begin, end);
  })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
