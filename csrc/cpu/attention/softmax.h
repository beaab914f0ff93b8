// Between the two products of attention: masks, exponentials, and weights as operands.
#pragma once
#include "../simd/math.h"
#include "../gemm/product.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr double kInfinity = __builtin_huge_val();

// Scores of 16-bit tensors are kept to base 2, for which the exponential is cheapest; others to base e, which is exact.
template <typename T> constexpr bool kBase2 = sizeof(T) == 2;
template <typename T> constexpr double kLogBase = kBase2<T> ? 0.6931471805599453 : 1.0;  // natural = kLogBase * kept
template <typename T, typename V> VEC_INLINE V exp_of(V x) {
  if constexpr (kBase2<T>) return exp2_for_16_bits(x);
  else return exp(x);
}

// s where low <= j < high, else -inf.
#if defined(CPU_CAPABILITY_AVX512)
VEC_INLINE Vec<float> within(Vec<float> s, Vec<float> j, Vec<float> low, Vec<float> high) {
  const __mmask16 keep = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(j.v, low.v, _CMP_GE_OQ), j.v, high.v, _CMP_LT_OQ);
  return _mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), keep, s.v);
}
VEC_INLINE Vec<double> within(Vec<double> s, Vec<double> j, Vec<double> low, Vec<double> high) {
  const __mmask8 keep = _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(j.v, low.v, _CMP_GE_OQ), j.v, high.v, _CMP_LT_OQ);
  return _mm512_mask_mov_pd(_mm512_set1_pd(-kInfinity), keep, s.v);
}
// x, and 0 where it is -inf: a lane that is fully masked so far is shifted by nothing.
VEC_INLINE Vec<float> finite_shift(Vec<float> x) {
  return _mm512_mask_mov_ps(x.v, _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-kInfinity), _CMP_EQ_OQ), _mm512_setzero_ps());
}
VEC_INLINE Vec<double> finite_shift(Vec<double> x) {
  return _mm512_mask_mov_pd(x.v, _mm512_cmp_pd_mask(x.v, _mm512_set1_pd(-kInfinity), _CMP_EQ_OQ), _mm512_setzero_pd());
}
#else
VEC_INLINE Vec<float> within(Vec<float> s, Vec<float> j, Vec<float> low, Vec<float> high) {
  const __m256 keep = _mm256_and_ps(_mm256_cmp_ps(j.v, low.v, _CMP_GE_OQ), _mm256_cmp_ps(j.v, high.v, _CMP_LT_OQ));
  return _mm256_blendv_ps(_mm256_set1_ps(-kInfinity), s.v, keep);
}
VEC_INLINE Vec<double> within(Vec<double> s, Vec<double> j, Vec<double> low, Vec<double> high) {
  const __m256d keep = _mm256_and_pd(_mm256_cmp_pd(j.v, low.v, _CMP_GE_OQ), _mm256_cmp_pd(j.v, high.v, _CMP_LT_OQ));
  return _mm256_blendv_pd(_mm256_set1_pd(-kInfinity), s.v, keep);
}
VEC_INLINE Vec<float> finite_shift(Vec<float> x) {
  return _mm256_blendv_ps(x.v, _mm256_setzero_ps(), _mm256_cmp_ps(x.v, _mm256_set1_ps(-kInfinity), _CMP_EQ_OQ));
}
VEC_INLINE Vec<double> finite_shift(Vec<double> x) {
  return _mm256_blendv_pd(x.v, _mm256_setzero_pd(), _mm256_cmp_pd(x.v, _mm256_set1_pd(-kInfinity), _CMP_EQ_OQ));
}
#endif

// x, and 0 in the lanes outside [first, last).
template <typename Acc> VEC_INLINE Vec<Acc> between(Vec<Acc> x, int first, int last) {
  using V = Vec<Acc>;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(Acc) == 4) return _mm512_maskz_mov_ps(V::first(last) & ~V::first(first), x.v);
  else return _mm512_maskz_mov_pd(V::first(last) & ~V::first(first), x.v);
#else
  const __m256i keep = _mm256_andnot_si256(V::first(first), V::first(last));
  if constexpr (sizeof(Acc) == 4) return _mm256_and_ps(x.v, _mm256_castsi256_ps(keep));
  else return _mm256_and_pd(x.v, _mm256_castsi256_pd(keep));
#endif
}

// Stores the weights of `step` successive keys as one vector of elements. Pairs are rounded to nearest with ties away from
// zero, which is one addition and one shift; ties to even would take three more instructions.
template <typename P> struct Weights {
  using V = Vec<typename P::Acc>;
  static VEC_INLINE void store(typename P::Element* p, V a) { a.store(p); }
};
#if defined(CPU_CAPABILITY_AVX512_BF16)
template <> struct Weights<Pairs> {
  using V = Vec<float>;
  static VEC_INLINE void store(uint32_t* p, V a, V b) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(a.v), half), 16);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(b.v), half);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, low, high));
  }
};
#endif

#if defined(CPU_CAPABILITY_AMX)
template <> struct Weights<Tiles> : Weights<Pairs> {};
#endif

// The same where the lanes run over the keys: whole elements of a row of weights.
template <typename P> VEC_INLINE void store_weights(typename P::Element* p, Vec<typename P::Acc> a) {
  if constexpr (P::step == 1) {
    a.store(p);
  } else {
#if defined(CPU_CAPABILITY_AVX512_BF16)
    const __m512i upper = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x8000)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(upper));
#endif
  }
}

// first, first + 1, ...
template <typename Acc> VEC_INLINE Vec<Acc> count_from(int64_t first) {
  alignas(64) Acc lanes[Vec<Acc>::size];
  for (int i = 0; i < Vec<Acc>::size; ++i) lanes[i] = static_cast<Acc>(first + i);
  return Vec<Acc>::load(lanes);
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
