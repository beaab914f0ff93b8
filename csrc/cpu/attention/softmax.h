// What attention computes between its two products: masks, exponentials, and weights as operands of the second product.
#pragma once
#include <limits>

#include "../gemm/product.h"
#include "../simd/mask.h"
#include "../simd/math.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr double kInfinity = __builtin_huge_val();

// Scores of 16-bit tensors are multiplied with log2(e), so that weights are 2^score, which costs least. Those of other tensors
// stay to base e, which adds no rounding.
template <typename T> constexpr bool kBase2 = sizeof(T) == 2;
template <typename T> constexpr double kLogBase = kBase2<T> ? 0.6931471805599453 : 1.0;  // score to base e = kLogBase * score
template <typename T, typename V> VEC_INLINE V exp_of(V x) {
  if constexpr (kBase2<T>) return exp2_for_16_bits(x);
  else return exp(x);
}

// s where low <= j < high, else -inf.
template <typename V> VEC_INLINE V within(V s, V j, V low, V high) {
  const V masked(-kInfinity);
  return pick(less(j, low), masked, pick(less(j, high), s, masked));
}

// What is subtracted from scores before the exponential: the maximum x, or 0 where x is -inf, because the lane is fully masked
// so far and -inf - -inf would be NaN.
template <typename Acc> VEC_INLINE Vec<Acc> finite_shift(Vec<Acc> x) {
  using V = Vec<Acc>;
  return pick(less(x, V(std::numeric_limits<Acc>::lowest())), V(0), x);
}

// x in lanes [first, last), and 0 in the other lanes.
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

#if defined(CPU_CAPABILITY_AVX512_BF16)
// Weights as bfloat16 in the upper halves of 32 bits, rounded to nearest with ties away from zero: one addition, where ties to
// even would take three more instructions.
VEC_INLINE __m512i rounded_weights(Vec<float> a) {
  return _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x8000));
}
// Stores the weights of two successive keys as one vector of pairs.
VEC_INLINE void store_pairs(uint32_t* p, Vec<float> a, Vec<float> b) {
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(rounded_weights(a), 16), rounded_weights(b)));
}
// Stores one lane's weights of successive keys.
VEC_INLINE void store_weights(uint32_t* p, Vec<float> a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_weights(a), 16)));
}
#endif
template <typename Acc> VEC_INLINE void store_weights(Acc* p, Vec<Acc> a) { a.store(p); }

// The vector first, first + 1, ...
template <typename Acc> VEC_INLINE Vec<Acc> count_from(int64_t first) {
  alignas(64) Acc lanes[Vec<Acc>::size];
  for (int i = 0; i < Vec<Acc>::size; ++i) lanes[i] = static_cast<Acc>(first + i);
  return Vec<Acc>::load(lanes);
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
