// Elementary functions on Vec, written here so that accuracy does not depend on the version of a library.
#pragma once
#include <math.h>

#include "vec.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

// The parts of exp(x) = 2^n * (1 + p): n = round(x / ln 2), and p = r + r^2 q(r) with a polynomial q and r = x - n ln 2, so
// that |r| <= ln 2 / 2. ln 2 is split into an upper and a lower part, so that n * (upper part) is exact.
template <typename V> struct ExpParts { V p, n, r, t; };  // t = r^2 q(r)

// In float, for a given n: q is fitted so that the maximum relative error of 1 + p is smallest (3.1e-9).
VEC_INLINE ExpParts<Vec<float>> exp_parts(Vec<float> x, Vec<float> n) {
  using V = Vec<float>;
  V r = fnma(n, V(0.693359375f), x);
  r = fnma(n, V(-2.12194440e-4f), r);
  V q = fma(V(0x1.6a2434p-10f), r, V(0x1.1239e2p-7f));
  q = fma(q, r, V(0x1.5558f2p-5f));
  q = fma(q, r, V(0x1.555492p-3f));
  q = fma(q, r, V(0x1.fffffcp-2f));
  return {fma(q * r, r, r), n, r, q * r * r};
}
VEC_INLINE ExpParts<Vec<float>> exp_parts(Vec<float> x) { return exp_parts(x, round(x * Vec<float>(1.44269504f))); }

// In double: 1 + p is Taylor's polynomial of degree 13, which on |r| <= ln 2 / 2 is exact to 5e-18.
VEC_INLINE ExpParts<Vec<double>> exp_parts(Vec<double> x) {
  using V = Vec<double>;
  const V n = round(x * V(1.4426950408889634));
  V r = fnma(n, V(0x1.62e42feep-1), x);
  r = fnma(n, V(0x1.a39ef35793c76p-33), r);
  V q = V(1.0 / 6227020800.0);
  q = fma(q, r, V(1.0 / 479001600.0));
  q = fma(q, r, V(1.0 / 39916800.0));
  q = fma(q, r, V(1.0 / 3628800.0));
  q = fma(q, r, V(1.0 / 362880.0));
  q = fma(q, r, V(1.0 / 40320.0));
  q = fma(q, r, V(1.0 / 5040.0));
  q = fma(q, r, V(1.0 / 720.0));
  q = fma(q, r, V(1.0 / 120.0));
  q = fma(q, r, V(1.0 / 24.0));
  q = fma(q, r, V(1.0 / 6.0));
  q = fma(q, r, V(0.5));
  return {fma(q * r, r, r), n, r, q * r * r};
}

// exp(x) within 1 ulp. NaN stays NaN, because min and max return their second argument where one is NaN. Overflow gives
// infinity, and underflow goes through the subnormal numbers to 0.
template <typename Acc> VEC_INLINE Vec<Acc> exp(Vec<Acc> x) {
  using V = Vec<Acc>;
  constexpr bool narrow = sizeof(Acc) == 4;
  const auto e = exp_parts(min(V(narrow ? 89 : 710), max(V(narrow ? -104 : -746), x)));
  return scale2(e.p + V(1), e.n);
}

// tanh(x) = m / (m + 2) with m = exp(2x) - 1 = 2^n p + (2^n - 1), n and p from exp_parts(2x). For small x n is 0 and nothing
// cancels. Within 3 ulp.
template <typename Acc> VEC_INLINE Vec<Acc> tanh(Vec<Acc> x) {
  using V = Vec<Acc>;
  constexpr int most = sizeof(Acc) == 4 ? 10 : 20;  // beyond this tanh rounds to 1
  x = min(V(most), max(V(-most), x));
  const auto e = exp_parts(x + x);
  const V power = scale2(V(1), e.n), m = fma(e.p, power, power - V(1));
  return m / (m + V(2));
}

// 2^x with a relative error below 2^-18, for results that are rounded to 16 bits. It is 2^n * (1 + f q(f)) with an integer n
// near x and f = x - n; q has degree 3 and is fitted so that the maximum relative error is smallest. Out of range the
// result is infinity or 0: AVX-512's scalef saturates, and AVX2 first bounds x to numbers at which 1 + f q(f) is exactly 1.
VEC_INLINE Vec<float> exp2_for_16_bits(Vec<float> x) {
  using V = Vec<float>;
#if defined(CPU_CAPABILITY_AVX512)
  const V f = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  V q = fma(V(0x1.b7f730p-7f), f, V(0x1.abf868p-5f));
  q = fma(q, f, V(0x1.ee2450p-3f));
  q = fma(q, f, V(0x1.62d6c6p-1f));
  return scale2(fma(q, f, V(1.0f)), x);  // scalef multiplies with 2^floor(x)
#else
  x = min(V(128.0f), max(V(-127.0f), x));
  const V n = round(x), f = x - n;
  V q = fma(V(0x1.3a02ccp-7f), f, V(0x1.c9fc46p-5f));
  q = fma(q, f, V(0x1.ec0378p-3f));
  q = fma(q, f, V(0x1.62e12cp-1f));
  const V p = fma(q, f, V(1.0f));  // 1 where x is at a bound: n = 128 then makes the bits of infinity, n = -127 those of 0
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23)));
#endif
}

// log_of and expm1_of call the functions of C. Those of C++ (std::log of a float) are inline, and the linker keeps one copy of
// an inline function for all builds, which might be that of AVX-512.
VEC_INLINE float log_of(float x) { return ::logf(x); }
VEC_INLINE double log_of(double x) { return ::log(x); }
VEC_INLINE float expm1_of(float x) { return ::expm1f(x); }
VEC_INLINE double expm1_of(double x) { return ::expm1(x); }

// The largest lane.
#if defined(CPU_CAPABILITY_AVX512)
VEC_INLINE float largest(Vec<float> x) { return _mm512_reduce_max_ps(x.v); }
VEC_INLINE double largest(Vec<double> x) { return _mm512_reduce_max_pd(x.v); }
#else
template <typename Acc> VEC_INLINE Acc largest(Vec<Acc> x) {
  alignas(64) Acc lanes[Vec<Acc>::size];
  x.store(lanes);
  Acc most = lanes[0];
  for (int i = 1; i < Vec<Acc>::size; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}
#endif

template <typename V> VEC_INLINE Two<V> exp2_for_16_bits(Two<V> x) { return {exp2_for_16_bits(x.a), exp2_for_16_bits(x.b)}; }
template <typename V> VEC_INLINE Two<V> exp(Two<V> x) { return {exp(x.a), exp(x.b)}; }

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
