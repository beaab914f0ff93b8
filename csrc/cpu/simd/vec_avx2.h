// Vec for AVX2, FMA and F16C. Included by vec.h only.
#pragma once

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

template <> struct Vec<float> {
  static constexpr int size = 8;
  __m256 v;
  VEC_INLINE Vec() : v(_mm256_setzero_ps()) {}
  VEC_INLINE Vec(__m256 x) : v(x) {}
  VEC_INLINE explicit Vec(float x) : v(_mm256_set1_ps(x)) {}

  static VEC_INLINE __m256i first(int n) {  // lanes below n are all ones
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  template <typename T> static VEC_INLINE __m128i part(const T* p, int n) {
    alignas(16) uint16_t lanes[8] = {};
    std::memcpy(lanes, p, 2 * static_cast<size_t>(n));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
  }
  static VEC_INLINE void put(void* p, __m128i x, int n) {
    alignas(16) uint16_t lanes[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(lanes), x);
    std::memcpy(p, lanes, 2 * static_cast<size_t>(n));
  }
  static VEC_INLINE __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  static VEC_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static VEC_INLINE Vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static VEC_INLINE Vec load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static VEC_INLINE Vec load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static VEC_INLINE Vec load(const bf16* p, int n) { return widen(part(p, n)); }
  static VEC_INLINE Vec load(const f16* p, int n) { return _mm256_cvtph_ps(part(p, n)); }

  // Rounds to nearest even; NaN stays NaN.
  VEC_INLINE __m128i to_bf16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i out = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1));
  }
  VEC_INLINE __m128i to_f16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  VEC_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  VEC_INLINE void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  VEC_INLINE void store(f16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16()); }
  VEC_INLINE void store(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
  VEC_INLINE void store(bf16* p, int n) const { put(p, to_bf16(), n); }
  VEC_INLINE void store(f16* p, int n) const { put(p, to_f16(), n); }
  template <typename T> VEC_INLINE Vec rounded_to() const;

  VEC_INLINE float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
};
VEC_INLINE Vec<float> round(Vec<float> a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC_INLINE Vec<float> scale2(Vec<float> a, Vec<float> n) {  // a * 2^n, in two factors, so that 2^n may be subnormal
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)));
}

VEC_INLINE __m128i first4(int n) { return _mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3)); }

template <> struct Vec<double> {
  static constexpr int size = 4;
  __m256d v;
  VEC_INLINE Vec() : v(_mm256_setzero_pd()) {}
  VEC_INLINE Vec(__m256d x) : v(x) {}
  VEC_INLINE explicit Vec(double x) : v(_mm256_set1_pd(x)) {}
  static VEC_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static VEC_INLINE Vec load(const double* p) { return _mm256_loadu_pd(p); }
  static VEC_INLINE Vec load(const double* p, int n) { return _mm256_maskload_pd(p, first(n)); }
  static VEC_INLINE Vec load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  static VEC_INLINE Vec load(const float* p, int n) {
    return _mm256_cvtps_pd(_mm_maskload_ps(p, first4(n)));
  }
  VEC_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  VEC_INLINE void store(double* p, int n) const { _mm256_maskstore_pd(p, first(n), v); }
  template <typename T> VEC_INLINE Vec rounded_to() const { return *this; }
  VEC_INLINE double sum() const {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
};
VEC_INLINE Vec<double> round(Vec<double> a) { return _mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC_INLINE Vec<double> scale2(Vec<double> a, Vec<double> n) {
  const __m128i whole = _mm256_cvtpd_epi32(n.v);
  const __m128i half = _mm_srai_epi32(whole, 1);
  const auto power = [](__m128i e) {
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_add_epi64(_mm256_cvtepi32_epi64(e), _mm256_set1_epi64x(1023)), 52));
  };
  return _mm256_mul_pd(_mm256_mul_pd(a.v, power(half)), power(_mm_sub_epi32(whole, half)));
}

VEC_INLINE Vec<float> swap_pairs(Vec<float> a) { return _mm256_permute_ps(a.v, 0xb1); }  // (x1, x0, x3, x2, ...)
VEC_INLINE Vec<double> swap_pairs(Vec<double> a) { return _mm256_permute_pd(a.v, 0x5); }

// deinterleave: turns two successive vectors into one of the even and one of the odd elements. interleave: the reverse.
VEC_INLINE __m256 lanes_0213(__m256 v) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
}
VEC_INLINE void deinterleave(Vec<float>& a, Vec<float>& b) {
  const __m256 first = a.v;
  a.v = lanes_0213(_mm256_shuffle_ps(first, b.v, 0x88));
  b.v = lanes_0213(_mm256_shuffle_ps(first, b.v, 0xdd));
}
VEC_INLINE void interleave(Vec<float>& a, Vec<float>& b) {
  const __m256 low = _mm256_unpacklo_ps(a.v, b.v), high = _mm256_unpackhi_ps(a.v, b.v);
  a.v = _mm256_permute2f128_ps(low, high, 0x20);
  b.v = _mm256_permute2f128_ps(low, high, 0x31);
}
// Even and odd elements of 16 bf16: a shift and a mask, half as many instructions as widening each half.
VEC_INLINE void load_split(const bf16* p, Vec<float>& even, Vec<float>& odd) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even.v = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  odd.v = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
// Float bits whose upper half is the nearest bf16, ties to even. A NaN stays NaN, because rounding could make it infinity.
VEC_INLINE __m256i rounded_upper(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  return _mm256_or_si256(rounded, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
VEC_INLINE void store_upper(bf16* p, __m256i even, __m256i odd) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa));
}
VEC_INLINE void store_split(bf16* p, Vec<float> even, Vec<float> odd) {
  store_upper(p, rounded_upper(even.v), rounded_upper(odd.v));
}
VEC_INLINE void store_split_exact(bf16* p, Vec<float> even, Vec<float> odd) {
  store_upper(p, _mm256_castps_si256(even.v), _mm256_castps_si256(odd.v));
}
VEC_INLINE Vec<float> round_upper(Vec<float> a) {
  return _mm256_castsi256_ps(_mm256_and_si256(rounded_upper(a.v), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Rounds to the nearest integer with ties to even, turns NaN into 0, and saturates to [-128, 127].
VEC_INLINE __m128i to_i8(Vec<float> a) {
  const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_ORD_Q));
  const __m256i wide = _mm256_and_si256(_mm256_cvtps_epi32(a.v), number);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return _mm_packs_epi16(words, words);
}
VEC_INLINE void store_i8(int8_t* p, Vec<float> a, All) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), to_i8(a)); }
VEC_INLINE void store_i8(int8_t* p, Vec<float> a, int n) {
  alignas(16) int8_t lanes[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), to_i8(a));
  std::memcpy(p, lanes, static_cast<size_t>(n));
}
// The larger of `most` and |a|, where `most` must not be negative and NaN counts as the largest: floats that are not negative
// compare as their bits do.
VEC_INLINE Vec<float> max_abs(Vec<float> most, Vec<float> a) {
  const __m256i bits = _mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x7fffffff));
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(most.v), bits));
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
