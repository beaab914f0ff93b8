// On Vec: log(x), log(1 + x), exp(x) - 1, and exp(x) - 1 - x.
#pragma once
#include <cmath>

#include "mask.h"
#include "math.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

// Returns log(1 + f) + e ln 2 for 1 + f in [sqrt(1/2), sqrt(2)], where f has no rounding error. With s = f / (2 + f) and
// R = 2 s^2 (1/3 + s^2/5 + ...), log(1 + f) = 2 atanh(s) = f - s (f - R), whose leading term f is exact. As s^2 <= 0.0295, the
// terms of R that are left out are below 3e-9 of the sum in float, and below 2e-17 in double.
VEC_INLINE Vec<float> log_from(Vec<float> f, Vec<float> e) {
  using V = Vec<float>;
  const V s = f / (V(2) + f), z = s * s;
  V r = fma(z, V(2.0f / 9), V(2.0f / 7));
  r = fma(z, r, V(2.0f / 5));
  r = fma(z, r, V(2.0f / 3)) * z;
  const V half = V(0.5f) * f * f;
  const V low = fma(s, half + r, e * V(-2.12194440e-4f));  // s (f - R) = f^2/2 - s (f^2/2 + R)
  return fma(e, V(0.693359375f), f - (half - low));
}
VEC_INLINE Vec<double> log_from(Vec<double> f, Vec<double> e) {
  using V = Vec<double>;
  const V s = f / (V(2) + f), z = s * s;
  V r = V(2.0 / 21);
#pragma GCC unroll 9
  for (int k = 19; k >= 3; k -= 2) r = fma(z, r, V(2.0 / k));
  r = r * z;
  const V half = V(0.5) * f * f;
  const V low = fma(s, half + r, e * V(0x1.a39ef35793c76p-33));
  return fma(e, V(0x1.62e42feep-1), f - (half - low));
}

// log(1 + x) for x in [0, 1], within 1 ulp; NaN stays NaN.
template <typename Acc> VEC_INLINE Vec<Acc> log1p_of_unit(Vec<Acc> x) {
  using V = Vec<Acc>;
  const auto upper = less(V(Acc(0.41421356)), x);
  return log_from(pick(upper, V(Acc(0.5)) * x - V(Acc(0.5)), x), only(upper, V(1)));
}

// log(x) for positive normal numbers, infinity and NaN.
VEC_INLINE Vec<float> log(Vec<float> x) {
  using V = Vec<float>;
  V e, m;
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i power = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  e = _mm512_cvtepi32_ps(power);
  m = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(power, 23)));
#else
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i power = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
  e = _mm256_cvtepi32_ps(power);
  m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(power, 23)));
#endif
  const V finite = log_from(m - V(1), e);
  return pick(less(x, V(__builtin_inff())), finite, x);  // infinity and NaN are their own logarithms
}
VEC_INLINE Vec<double> log(Vec<double> x) {
  double lanes[Vec<double>::size];
  x.store(lanes);
  for (double& lane : lanes) lane = std::log(lane);
  return Vec<double>::load(lanes);
}

// exp(x) = power * (1 + r + t) with power = 2^n, and `whole` is exp(x) itself. Where |x| < ln 2 / 2, n is 0 and r is x. An x
// for which exp(x) would underflow or overflow is bounded first.
template <typename V> struct ExpTerms { V r, t, power, whole; };
template <typename Acc> VEC_INLINE ExpTerms<Vec<Acc>> exp_terms(Vec<Acc> x) {
  using V = Vec<Acc>;
  constexpr bool narrow = sizeof(Acc) == 4;
  const V bounded = min(V(narrow ? 89 : 710), max(V(narrow ? -104 : -746), x));
  const auto e = exp_parts(bounded);
  return {e.r, e.t, scale2(V(1), e.n), scale2(e.p + V(1), e.n)};
}

// expm1(x) = exp(x) - 1, within 2 ulp, and expm1_minus(x) = exp(x) - 1 - x, within 4 ulp. Near 0 neither cancels.
template <typename Acc> VEC_INLINE Vec<Acc> expm1(Vec<Acc> x) {
  using V = Vec<Acc>;
  const auto e = exp_terms(x);
  const V sum = fma(e.power, e.r + e.t, e.power - V(1));
  return pick(less(V(64), x), e.whole, sum);  // above 64 exp(x) - 1 rounds to exp(x), and e.power may be infinite
}
template <typename V> VEC_INLINE V expm1_minus(V x, ExpTerms<V> e) {  // valid only where exp(x) is finite
  return fma(e.power, e.t, fma(e.power, e.r, e.power - V(1)) - x);
}
template <typename Acc> VEC_INLINE Vec<Acc> expm1_minus(Vec<Acc> x) {
  const auto e = exp_terms(x);
  return pick(less(Vec<Acc>(64), x), e.whole - x, expm1_minus(x, e));
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
