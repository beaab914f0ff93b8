// The statistics of blocks of logits for sample.cpp: those of HeadRows::statistics (head/head_logits.h) bit for bit, in fewer
// instructions.
//
// The largest exponential of a block is 1. An exponential below exp(-87) therefore has no influence on the bits of their sum,
// and is replaced by exp(-87), so that 2^n can be added to the exponent as an integer. Otherwise every operation rounds as there.
// Four blocks are reduced across lanes together, in the order of Vec::sum.
#pragma once
#include "head/head_logits.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr int64_t kTogether = 4;  // blocks
constexpr float kLeast = -3.4028234663852886e38f;

struct Add { VEC_INLINE __m128 operator()(__m128 a, __m128 b) const { return _mm_add_ps(a, b); } };
struct Most { VEC_INLINE __m128 operator()(__m128 a, __m128 b) const { return _mm_max_ps(a, b); } };

// The four quarters of a vector combined to one: (0 and 2) with (1 and 3), as Vec::sum does.
#if defined(CPU_CAPABILITY_AVX512)
VEC_INLINE __m256 halves(Add, Vec<float> a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}
VEC_INLINE __m256 halves(Most, Vec<float> a) {
  return _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}
#else
template <typename F> VEC_INLINE __m256 halves(F, Vec<float> a) { return a.v; }
#endif
template <typename F> VEC_INLINE __m128 quarter(F f, Vec<float> a) {
  const __m256 half = halves(f, a);
  return f(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
template <typename F> VEC_INLINE __m128 reduce(F f, const Vec<float>* x) {
  const __m128 a = quarter(f, x[0]), b = quarter(f, x[1]), c = quarter(f, x[2]), d = quarter(f, x[3]);
  const __m128 ab = f(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b)), cd = f(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  return f(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}

// max(x, -87) for x <= 0, as a minimum of the bits: the units that compare floats are those that multiply. NaN stays NaN or
// becomes -87.
VEC_INLINE Vec<float> at_least(Vec<float> x) {
  const int bits = static_cast<int>(0xc2ae0000u);  // of -87
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_castsi512_ps(_mm512_min_epu32(_mm512_castps_si512(x.v), _mm512_set1_epi32(bits)));
#else
  return _mm256_castsi256_ps(_mm256_min_epu32(_mm256_castps_si256(x.v), _mm256_set1_epi32(bits)));
#endif
}

// exp(x) for x in [-87, 0], the bits of exp. NaN becomes some number.
VEC_INLINE Vec<float> exp_near(Vec<float> x) {
  using V = Vec<float>;
  const V magic(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is in the lower bits of the sum
  const V sum = x * V(1.44269504f) + magic, n = sum - magic;
  const V p = exp_parts(x, n).p + V(1);
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), _mm512_slli_epi32(_mm512_castps_si512(sum.v), 23)));
#else
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), _mm256_slli_epi32(_mm256_castps_si256(sum.v), 23)));
#endif
}

// Writes the largest logit and the sum of exponentials of kTogether whole blocks, whose logits are `from` times `factor`. Where
// one of them is NaN or +inf, `fault` becomes NaN in a lane.
template <bool kScaled, typename T>
VEC_INLINE void block_statistics(const T* from, float factor, float* max_to, float* sum_to, Vec<float>& fault) {
  using V = Vec<float>;
  constexpr int64_t each = kHeadBlock / V::size, sums = 16 / V::size;
  const V by(factor);
  const auto at = [&](int64_t i) VEC_LAMBDA {
    const V x = V::load(from + i * V::size);
    return kScaled ? x * by : x;
  };
  V most[kTogether], sum[kTogether];
#pragma GCC unroll 4
  for (int64_t b = 0; b < kTogether; ++b) {
    most[b] = V::load(from + b * each * V::size);
#pragma GCC unroll 8
    for (int64_t i = 1; i < each; ++i) most[b] = max(most[b], V::load(from + (b * each + i) * V::size));
  }
  // Rounding keeps the order, so that the product of the largest logit is the largest product.
  const __m128 tops = kScaled ? _mm_mul_ps(reduce(Most(), most), _mm_set1_ps(factor)) : reduce(Most(), most);
  alignas(16) float shift[kTogether];
  _mm_store_ps(shift, _mm_max_ps(tops, _mm_set1_ps(kLeast)));
#pragma GCC unroll 4
  for (int64_t b = 0; b < kTogether; ++b) {
    const V down(shift[b]);
    V part[sums] = {};
#pragma GCC unroll 8
    for (int64_t i = 0; i < each; ++i) {
      const V d = at(b * each + i) - down;
      fault = fault + d;
      part[i % sums] = part[i % sums] + exp_near(at_least(d));
    }
    sum[b] = sums == 2 ? part[0] + part[sums - 1] : part[0];
  }
  const __m128 none = _mm_cmplt_ps(tops, _mm_set1_ps(kLeast));  // blocks of nothing but -inf
  _mm_storeu_ps(max_to, tops);
  _mm_storeu_ps(sum_to, _mm_andnot_ps(none, reduce(Add(), sum)));
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
