// Vec for AVX-512 (F, BW, VL, DQ). Included by vec.h only.
#pragma once

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

template <> struct Vec<float> {
  static constexpr int size = 16;
  __m512 v;
  VEC_INLINE Vec() : v(_mm512_setzero_ps()) {}
  VEC_INLINE Vec(__m512 x) : v(x) {}
  VEC_INLINE explicit Vec(float x) : v(_mm512_set1_ps(x)) {}

  static VEC_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static VEC_INLINE __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static VEC_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static VEC_INLINE Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static VEC_INLINE Vec load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static VEC_INLINE Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static VEC_INLINE Vec load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  static VEC_INLINE Vec load(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }

  // Rounds to nearest even; NaN stays NaN.
  VEC_INLINE __m256i to_bf16() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i out = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(out);
  }
  VEC_INLINE __m256i to_f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  VEC_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  VEC_INLINE void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  VEC_INLINE void store(f16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16()); }
  VEC_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  VEC_INLINE void store(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_bf16()); }
  VEC_INLINE void store(f16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_f16()); }
  // This vector after rounding to storage type T, as a store as T and a load would return it.
  template <typename T> VEC_INLINE Vec rounded_to() const;

  VEC_INLINE float sum() const {  // adds the halves of the vector, then the halves of the result, and so on
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
  }
};
VEC_INLINE Vec<float> round(Vec<float> a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC_INLINE Vec<float> scale2(Vec<float> a, Vec<float> n) { return _mm512_scalef_ps(a.v, n.v); }  // a * 2^n, n integral

template <> struct Vec<double> {
  static constexpr int size = 8;
  __m512d v;
  VEC_INLINE Vec() : v(_mm512_setzero_pd()) {}
  VEC_INLINE Vec(__m512d x) : v(x) {}
  VEC_INLINE explicit Vec(double x) : v(_mm512_set1_pd(x)) {}
  static VEC_INLINE __mmask8 first(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
  static VEC_INLINE Vec load(const double* p) { return _mm512_loadu_pd(p); }
  static VEC_INLINE Vec load(const double* p, int n) { return _mm512_maskz_loadu_pd(first(n), p); }
  static VEC_INLINE Vec load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  static VEC_INLINE Vec load(const float* p, int n) { return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(first(n), p)); }
  VEC_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  VEC_INLINE void store(double* p, int n) const { _mm512_mask_storeu_pd(p, first(n), v); }
  template <typename T> VEC_INLINE Vec rounded_to() const { return *this; }
  VEC_INLINE double sum() const {
    const __m256d half = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
    const __m128d quarter = _mm_add_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
    return _mm_cvtsd_f64(_mm_add_sd(quarter, _mm_unpackhi_pd(quarter, quarter)));
  }
};
VEC_INLINE Vec<double> round(Vec<double> a) { return _mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC_INLINE Vec<double> scale2(Vec<double> a, Vec<double> n) { return _mm512_scalef_pd(a.v, n.v); }

VEC_INLINE Vec<float> swap_pairs(Vec<float> a) { return _mm512_permute_ps(a.v, 0xb1); }  // (x1, x0, x3, x2, ...)
VEC_INLINE Vec<double> swap_pairs(Vec<double> a) { return _mm512_permute_pd(a.v, 0x55); }

// deinterleave: turns two successive vectors into one of the even and one of the odd elements. interleave: the reverse.
VEC_INLINE void deinterleave(Vec<float>& a, Vec<float>& b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 first = a.v;
  a.v = _mm512_permutex2var_ps(first, even, b.v);
  b.v = _mm512_permutex2var_ps(first, _mm512_or_si512(even, _mm512_set1_epi32(1)), b.v);
}
VEC_INLINE void interleave(Vec<float>& a, Vec<float>& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512 even = a.v;
  a.v = _mm512_permutex2var_ps(even, low, b.v);
  b.v = _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b.v);
}
// Even and odd elements of 32 bf16: a shift and a mask, half as many instructions as widening each half.
VEC_INLINE void load_split(const bf16* p, Vec<float>& even, Vec<float>& odd) {
  const __m512i bits = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  odd.v = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
// Float bits whose upper half is the nearest bf16, ties to even. A NaN is quieted, because rounding could make it infinity.
VEC_INLINE __m512i rounded_upper(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_castps_si512(_mm512_fixupimm_ps(_mm512_castsi512_ps(rounded), v, _mm512_set1_epi32(0x22), 0));
}
VEC_INLINE void store_upper(bf16* p, __m512i even, __m512i odd) {
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even, 16), odd));
}
VEC_INLINE void store_split(bf16* p, Vec<float> even, Vec<float> odd) {
  store_upper(p, rounded_upper(even.v), rounded_upper(odd.v));
}
VEC_INLINE void store_split_exact(bf16* p, Vec<float> even, Vec<float> odd) {
  store_upper(p, _mm512_castps_si512(even.v), _mm512_castps_si512(odd.v));
}
VEC_INLINE Vec<float> round_upper(Vec<float> a) {
  return _mm512_castsi512_ps(_mm512_and_si512(rounded_upper(a.v), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Rounds to the nearest integer with ties to even, turns NaN into 0, and saturates to [-128, 127].
VEC_INLINE __m128i to_i8(Vec<float> a) {
  return _mm512_cvtsepi32_epi8(_mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), a.v));
}
VEC_INLINE void store_i8(int8_t* p, Vec<float> a, All) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_i8(a)); }
VEC_INLINE void store_i8(int8_t* p, Vec<float> a, int n) { _mm_mask_storeu_epi8(p, Vec<float>::first(n), to_i8(a)); }
// The larger of `most` and |a|, where `most` must not be negative and NaN counts as the largest: floats that are not negative
// compare as their bits do.
VEC_INLINE Vec<float> max_abs(Vec<float> most, Vec<float> a) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff));
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(most.v), bits));
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
