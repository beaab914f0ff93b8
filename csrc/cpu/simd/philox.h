// Random bits that are a function of seed and counter alone: Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3" (SC 2011). A counter of four 32-bit words gives four random words, which are 16 bits for each of
// 8 elements. One call computes one counter in each 64-bit lane of a vector, for Vec<float>::size * 4 elements together.
#pragma once
#include "vec.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr uint32_t kPhiloxA = 0xd2511f53u, kPhiloxB = 0xcd9e8d57u, kWeylA = 0x9e3779b9u, kWeylB = 0xbb67ae85u;
constexpr int kPhiloxElements = 4 * Vec<float>::size, kPhiloxRounds = 10;

struct PhiloxKey {  // the keys of all rounds
  uint64_t low[kPhiloxRounds], high[kPhiloxRounds];
  PhiloxKey(uint32_t a, uint32_t b) {
    for (int round = 0; round < kPhiloxRounds; ++round, a += kWeylA, b += kWeylB) {
      low[round] = a;
      high[round] = b;
    }
  }
};

#if defined(CPU_CAPABILITY_AVX512)
using Words = __m512i;
VEC_INLINE Words same(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
VEC_INLINE Words product(Words a, Words b) { return _mm512_mul_epu32(a, b); }
VEC_INLINE Words upper(Words a) { return _mm512_srli_epi64(a, 32); }
VEC_INLINE Words xor3(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
VEC_INLINE Words plus(Words a, Words b) { return _mm512_add_epi64(a, b); }
VEC_INLINE Words pairs(Words low, Words high) { return _mm512_mask_shuffle_epi32(low, 0xaaaa, high, _MM_PERM_CCAA); }
VEC_INLINE Words first_of(Words a, Words b) { return _mm512_unpacklo_epi64(a, b); }
VEC_INLINE Words second_of(Words a, Words b) { return _mm512_unpackhi_epi64(a, b); }
VEC_INLINE Words order() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }  // philox() then returns them in order
#else
using Words = __m256i;
VEC_INLINE Words same(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
VEC_INLINE Words product(Words a, Words b) { return _mm256_mul_epu32(a, b); }
VEC_INLINE Words upper(Words a) { return _mm256_srli_epi64(a, 32); }
VEC_INLINE Words xor3(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
VEC_INLINE Words plus(Words a, Words b) { return _mm256_add_epi64(a, b); }
VEC_INLINE Words pairs(Words low, Words high) { return _mm256_blend_epi32(low, _mm256_shuffle_epi32(high, 0xa0), 0xaa); }
VEC_INLINE Words first_of(Words a, Words b) { return _mm256_unpacklo_epi64(a, b); }
VEC_INLINE Words second_of(Words a, Words b) { return _mm256_unpackhi_epi64(a, b); }
VEC_INLINE Words order() { return _mm256_setr_epi64x(0, 2, 1, 3); }
#endif

// Writes to a and b the four random words of each of the counters (low half of first + i, high half of first + i, third,
// fourth), i = 0, 1, ..., one after the other. Each 64-bit lane computes one counter, and c0 to c3 hold a word in the lower
// half of a lane; the upper half is read (by upper()) only of a product.
VEC_INLINE void philox(const PhiloxKey& key, uint64_t first, uint32_t third, uint32_t fourth, Words& a, Words& b) {
  Words c0 = plus(same(first), order()), c1 = upper(c0), c2 = same(third), c3 = same(fourth);
  const Words by_a = same(kPhiloxA), by_b = same(kPhiloxB);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Words pa = product(c0, by_a), pb = product(c2, by_b);
    c0 = xor3(upper(pb), c1, same(key.low[round]));
    c1 = pb;
    c2 = xor3(upper(pa), c3, same(key.high[round]));
    c3 = pa;
  }
  const Words front = pairs(c0, c1), back = pairs(c2, c3);
  a = first_of(front, back);
  b = second_of(front, back);
}

// Stores a pair of vectors (even and odd elements) as bf16 with stochastic rounding, whose expected value is exact: what is
// stored is the upper half of bits(x) + r, with 16 random bits r. Infinity and NaN are rounded as usual, and no finite number
// becomes infinite.
#if defined(CPU_CAPABILITY_AVX512)
VEC_INLINE __m512i stochastic_upper(__m512 v, __m512i random) {
  const __m512i bits = _mm512_castps_si512(v), sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const __m512i size = _mm512_andnot_si512(sign, bits);
  const __m512i moved = _mm512_min_epi32(_mm512_add_epi32(size, random), _mm512_set1_epi32(0x7f7fffff));
  const __mmask16 finite = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(0x7f800000));
  return _mm512_mask_or_epi32(rounded_upper(v), finite, moved, _mm512_and_si512(sign, bits));
}
VEC_INLINE void store_stochastic(bf16* p, Vec<float> even, Vec<float> odd, Words random) {
  store_upper(p, stochastic_upper(even.v, _mm512_and_si512(random, _mm512_set1_epi32(0xffff))),
              stochastic_upper(odd.v, _mm512_srli_epi32(random, 16)));
}
#else
VEC_INLINE __m256i stochastic_upper(__m256 v, __m256i random) {
  const __m256i bits = _mm256_castps_si256(v), sign = _mm256_set1_epi32(static_cast<int>(0x80000000u));
  const __m256i size = _mm256_andnot_si256(sign, bits);
  const __m256i moved = _mm256_min_epi32(_mm256_add_epi32(size, random), _mm256_set1_epi32(0x7f7fffff));
  const __m256i finite = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x7f800000), size);
  return _mm256_blendv_epi8(rounded_upper(v), _mm256_or_si256(moved, _mm256_and_si256(sign, bits)), finite);
}
VEC_INLINE void store_stochastic(bf16* p, Vec<float> even, Vec<float> odd, Words random) {
  store_upper(p, stochastic_upper(even.v, _mm256_and_si256(random, _mm256_set1_epi32(0xffff))),
              stochastic_upper(odd.v, _mm256_srli_epi32(random, 16)));
}
#endif

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
