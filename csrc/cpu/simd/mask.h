// Comparison and selection of lanes, byte masks of bool tensors, and sums of float vectors in double.
#pragma once
#include "vec.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

#if defined(CPU_CAPABILITY_AVX512)
VEC_INLINE __mmask16 less(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
VEC_INLINE __mmask8 less(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ); }
VEC_INLINE Vec<float> pick(__mmask16 m, Vec<float> a, Vec<float> b) { return _mm512_mask_mov_ps(b.v, m, a.v); }
VEC_INLINE Vec<double> pick(__mmask8 m, Vec<double> a, Vec<double> b) { return _mm512_mask_mov_pd(b.v, m, a.v); }
VEC_INLINE Vec<float> magnitude(Vec<float> a) { return _mm512_abs_ps(a.v); }
VEC_INLINE Vec<double> magnitude(Vec<double> a) { return _mm512_abs_pd(a.v); }
VEC_INLINE Vec<float> root(Vec<float> a) { return _mm512_sqrt_ps(a.v); }
VEC_INLINE Vec<double> root(Vec<double> a) { return _mm512_sqrt_pd(a.v); }
VEC_INLINE __mmask16 true_bytes(const uint8_t* p, Vec<float>) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_test_epi8_mask(bytes, bytes);
}
VEC_INLINE __mmask8 true_bytes(const uint8_t* p, Vec<double>) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return static_cast<__mmask8>(_mm_test_epi8_mask(bytes, bytes));
}
#else
struct FloatMask { __m256 v; };
struct DoubleMask { __m256d v; };
VEC_INLINE FloatMask less(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
VEC_INLINE DoubleMask less(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
VEC_INLINE Vec<float> pick(FloatMask m, Vec<float> a, Vec<float> b) { return _mm256_blendv_ps(b.v, a.v, m.v); }
VEC_INLINE Vec<double> pick(DoubleMask m, Vec<double> a, Vec<double> b) { return _mm256_blendv_pd(b.v, a.v, m.v); }
VEC_INLINE Vec<float> magnitude(Vec<float> a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
VEC_INLINE Vec<double> magnitude(Vec<double> a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v); }
VEC_INLINE Vec<float> root(Vec<float> a) { return _mm256_sqrt_ps(a.v); }
VEC_INLINE Vec<double> root(Vec<double> a) { return _mm256_sqrt_pd(a.v); }
VEC_INLINE FloatMask true_bytes(const uint8_t* p, Vec<float>) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
}
VEC_INLINE DoubleMask true_bytes(const uint8_t* p, Vec<double>) {
  int32_t bytes;
  std::memcpy(&bytes, p, 4);
  return {_mm256_castsi256_pd(_mm256_cmpgt_epi64(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes)), _mm256_setzero_si256()))};
}
#endif

// The mask of the lanes whose byte in a bool tensor is true. Lane i belongs to byte p[i]; lanes from n on are false.
template <typename V> VEC_INLINE auto true_lanes(const uint8_t* p, All) { return true_bytes(p, V()); }
template <typename V> VEC_INLINE auto true_lanes(const uint8_t* p, int n) {
  uint8_t bytes[V::size] = {};
  std::memcpy(bytes, p, static_cast<size_t>(n));
  return true_bytes(bytes, V());
}

// a in the lanes of mask m, and 0 in the other lanes, so that an entry outside the mask has no influence even if it is NaN.
template <typename M, typename Acc> VEC_INLINE Vec<Acc> only(M m, Vec<Acc> a) { return pick(m, a, Vec<Acc>()); }

// ------------------------------------------------------------------------------------------------- sums in double
#if defined(CPU_CAPABILITY_AVX512)
VEC_INLINE Vec<double> lower_half(Vec<float> x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)); }
VEC_INLINE Vec<double> upper_half(Vec<float> x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)); }
#else
VEC_INLINE Vec<double> lower_half(Vec<float> x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x.v)); }
VEC_INLINE Vec<double> upper_half(Vec<float> x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)); }
#endif

// The sum of many float terms, held in double: where large terms cancel, the digits of the small ones are not lost.
struct WideSum {
  Vec<double> low, high;
  VEC_INLINE void add(Vec<float> x) {
    low = low + lower_half(x);
    high = high + upper_half(x);
  }
  VEC_INLINE void add(Vec<double> x) { low = low + x; }
  VEC_INLINE void add_product(Vec<float> x, Vec<float> y) {
    low = fma(lower_half(x), lower_half(y), low);
    high = fma(upper_half(x), upper_half(y), high);
  }
  VEC_INLINE void add_product(Vec<double> x, Vec<double> y) { low = fma(x, y, low); }
  VEC_INLINE double sum() const { return (low + high).sum(); }
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
