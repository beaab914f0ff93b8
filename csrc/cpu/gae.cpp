#include "../gae.h"

#include <algorithm>

#include "elementwise.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

// Moves lanes down by k: lane i of the result is lane i + k of x, or 0 where x has no such lane.
#if defined(CPU_CAPABILITY_AVX512)
template <int k> VEC_INLINE Vec<float> lanes_down(Vec<float> x) {
  return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_setzero_si512(), _mm512_castps_si512(x.v), k));
}
template <int k> VEC_INLINE Vec<double> lanes_down(Vec<double> x) {
  return _mm512_castsi512_pd(_mm512_alignr_epi64(_mm512_setzero_si512(), _mm512_castpd_si512(x.v), k));
}
#else
template <int k> VEC_INLINE Vec<float> lanes_down(Vec<float> x) {
  const __m256 upper = _mm256_permute2f128_ps(x.v, x.v, 0x81);  // the upper half, then 0
  if constexpr (k == 4) return upper;
  else return _mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(upper), _mm256_castps_si256(x.v), 4 * k));
}
template <int k> VEC_INLINE Vec<double> lanes_down(Vec<double> x) {
  const __m256d upper = _mm256_permute2f128_pd(x.v, x.v, 0x81);
  if constexpr (k == 2) return upper;
  else return _mm256_castsi256_pd(_mm256_alignr_epi8(_mm256_castpd_si256(upper), _mm256_castpd_si256(x.v), 8 * k));
}
#endif

// The recurrence A_t = delta_t + decay A_{t+1}, decay = gamma lam, as a scan over the lanes of a vector. In steps k = 1, 2, 4,
// ... each lane adds decay^k times the lane k above, and then holds the decayed sum of 2 k deltas. At last each lane adds the
// advantage of the token after the vector, times the power of decay for their distance. Vectors are counted from the end of a
// sequence, so that its bits do not depend on other sequences.
template <typename Acc> struct Scan {
  using V = Vec<Acc>;
  V gamma, decay[4];
  // Read from offset V::size - n on, for a vector of n tokens:
  Acc powers[2 * V::size];  // decay^(V::size - i) for i < V::size, then 0
  Acc last[2 * V::size];    // 1 at V::size - 1, which marks the last token, else 0
  explicit Scan(double gamma_, double lam) : gamma(static_cast<Acc>(gamma_)) {
    double power = gamma_ * lam;
    for (V& step : decay) {
      step = V(static_cast<Acc>(power));
      power *= power;
    }
    power = 1;
    for (int i = 0; i < V::size; ++i) powers[V::size - 1 - i] = static_cast<Acc>(power *= gamma_ * lam);
    for (int i = V::size; i < 2 * V::size; ++i) powers[i] = 0;
    for (int i = 0; i < 2 * V::size; ++i) last[i] = static_cast<Acc>(i == V::size - 1);
  }

  // Writes the advantages of n successive tokens. On entry `next` and `carry` are the value and the advantage of the token
  // after them; on return they are those of the first of the n tokens.
  void run(const Acc* r, const Acc* v, int64_t n, Acc* out, Acc& next, Acc& carry) const {
    for (; n >= V::size; n -= V::size) {
      const int64_t i = n - V::size;
      step(r + i, v + i, out + i, All{}, V::size, next, carry);
    }
    if (n > 0) step(r, v, out, static_cast<int>(n), static_cast<int>(n), next, carry);
  }

  template <typename N>
  VEC_INLINE void step(const Acc* r, const Acc* v, Acc* out, N lanes, int n, Acc& next, Acc& carry) const {
    const auto end = less(V(0), V::load(last + V::size - n));  // lane n - 1
    const V value = load<V>(v, lanes), behind = pick(end, V(next), lanes_down<1>(value));
    V a = fma(gamma, behind, load<V>(r, lanes)) - value;
    a = fma(decay[0], lanes_down<1>(a), a);
    a = fma(decay[1], lanes_down<2>(a), a);
    if constexpr (V::size >= 8) a = fma(decay[2], lanes_down<4>(a), a);
    if constexpr (V::size >= 16) a = fma(decay[3], lanes_down<8>(a), a);
    a = fma(V::load(powers + V::size - n), V(carry), a);
    store(out, a, lanes);
    next = value.v[0];
    carry = a.v[0];
  }
};

template <typename Acc> struct Part { const Acc *rewards, *values; Acc *advantages, *returns; int64_t n; };

template <typename Acc> VEC_INLINE void add_values(const Part<Acc>& p) {
  using V = Vec<Acc>;
  for_vectors<V, Single>(p.n, [&](int64_t j, auto lanes) VEC_LAMBDA {
    store(p.returns + j, load<V>(p.advantages + j, lanes) + load<V>(p.values + j, lanes), lanes);
  });
}

// A part of a sequence with a mask. Copies its unmasked tokens together and scans those, so that nothing masked enters a sum. A
// masked token then gets the advantage of the next unmasked one.
template <typename Acc>
void masked_part(const Scan<Acc>& scan, const Part<Acc>& p, const uint8_t* mask, Acc& next, Acc& carry) {
  Acc rewards[kBlock + 1], values[kBlock + 1], advantages[kBlock + 1];
  int64_t count = 0;
  for (int64_t t = 0; t < p.n; ++t) {
    rewards[count] = p.rewards[t];
    values[count] = p.values[t];
    count += mask[t] != 0;
  }
  const Acc behind = carry;
  scan.run(rewards, values, count, advantages, next, carry);
  advantages[count] = behind;
  int64_t i = 0;
  for (int64_t t = 0; t < p.n; ++t) {
    p.advantages[t] = advantages[i];
    i += mask[t] != 0;
  }
}

template <typename Acc> void gae(const Gae& a, int64_t begin, int64_t end) {
  const Scan<Acc> scan(a.gamma, a.lam);
  Acc reward_buffer[kBlock], value_buffer[kBlock];
  for (int64_t sequence = begin; sequence < end; ++sequence) {
    Acc next = a.bootstrap ? static_cast<const Acc*>(a.bootstrap)[sequence] : Acc(0), carry = 0;
    int64_t last = a.cu_seqlens[sequence + 1];
    for (const int64_t first = a.cu_seqlens[sequence]; last > first;) {
      const int64_t n = std::min(kBlock, last - first), t = last - n;
      Part<Acc> p{block_of(a.rewards, t, n, reward_buffer), block_of(a.values, t, n, value_buffer),
                  static_cast<Acc*>(a.advantages) + t, static_cast<Acc*>(a.returns) + t, n};
      if (a.mask == nullptr) scan.run(p.rewards, p.values, n, p.advantages, next, carry);
      else masked_part(scan, p, a.mask + t, next, carry);
      add_values(p);
      last = t;
    }
  }
}

}  // namespace

void gae_fwd(const Gae& a, int64_t begin, int64_t end) { WITH_ACC(a.acc, Acc, { gae<Acc>(a, begin, end); }) }

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
