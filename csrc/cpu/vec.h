// SIMD vectors of one accumulator type, compiled once for AVX2 and once for AVX-512 (CPU_CAPABILITY says which).
//
// Why not at::vec: its exp and kin call Sleef symbols that libtorch_cpu exports but no ABI promises, and it rounds to
// bfloat16 in several instructions more. Everything is in an unnamed namespace inside the instruction set's own: a weak
// symbol shared between the two builds would let the linker run AVX-512 code on an AVX2 machine.
//
// Vec<float> and Vec<double> hold `size` lanes. load/store convert from and to the storage types float, bf16, f16 and
// double; load(p, n) and store(p, n) touch only the first n lanes (missing lanes read as 0).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../types.h"

#define VEC_INLINE inline __attribute__((always_inline))

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

template <typename Acc> struct Vec;
struct All {};  // "every lane", where an int says how many

// The accumulator of a storage type: float for the 16- and 32-bit types, double for double.
template <typename T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <typename T> using acc_t = typename AccOf<T>::type;

VEC_INLINE float to_acc(float v) { return v; }
VEC_INLINE double to_acc(double v) { return v; }
VEC_INLINE float to_acc(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
VEC_INLINE float to_acc(f16 v) { return _cvtsh_ss(v.bits); }

#if defined(CPU_CAPABILITY_AVX512)
// ------------------------------------------------------------------------------------------------------- AVX-512
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

  // Round to nearest even; a NaN stays a NaN.
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
  // What the value becomes when it is stored as T and read again.
  template <typename T> VEC_INLINE Vec rounded_to() const;

  VEC_INLINE float sum() const {  // halves folded in a fixed order
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
  }
  VEC_INLINE Vec operator+(Vec b) const { return _mm512_add_ps(v, b.v); }
  VEC_INLINE Vec operator-(Vec b) const { return _mm512_sub_ps(v, b.v); }
  VEC_INLINE Vec operator*(Vec b) const { return _mm512_mul_ps(v, b.v); }
  VEC_INLINE Vec operator/(Vec b) const { return _mm512_div_ps(v, b.v); }
};
VEC_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
VEC_INLINE Vec<float> fnma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }
VEC_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a.v, b.v); }
VEC_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm512_min_ps(a.v, b.v); }
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
  VEC_INLINE Vec operator+(Vec b) const { return _mm512_add_pd(v, b.v); }
  VEC_INLINE Vec operator-(Vec b) const { return _mm512_sub_pd(v, b.v); }
  VEC_INLINE Vec operator*(Vec b) const { return _mm512_mul_pd(v, b.v); }
  VEC_INLINE Vec operator/(Vec b) const { return _mm512_div_pd(v, b.v); }
};
VEC_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
VEC_INLINE Vec<double> fnma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fnmadd_pd(a.v, b.v, c.v); }
VEC_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return _mm512_max_pd(a.v, b.v); }
VEC_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return _mm512_min_pd(a.v, b.v); }
VEC_INLINE Vec<double> round(Vec<double> a) { return _mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC_INLINE Vec<double> scale2(Vec<double> a, Vec<double> n) { return _mm512_scalef_pd(a.v, n.v); }

// Adjacent pairs (x0, x1) as (x1, x0); negation of every lane in `odd` (0 or 1) position; a table entry for each pair.
VEC_INLINE Vec<float> swap_pairs(Vec<float> a) { return _mm512_permute_ps(a.v, 0xb1); }
VEC_INLINE Vec<double> swap_pairs(Vec<double> a) { return _mm512_permute_pd(a.v, 0x55); }
template <int odd> VEC_INLINE Vec<float> negate_lanes(Vec<float> a) {
  return _mm512_mask_xor_ps(a.v, odd ? 0xaaaa : 0x5555, a.v, _mm512_set1_ps(-0.0f));
}
template <int odd> VEC_INLINE Vec<double> negate_lanes(Vec<double> a) {
  return _mm512_mask_xor_pd(a.v, odd ? 0xaa : 0x55, a.v, _mm512_set1_pd(-0.0));
}
VEC_INLINE Vec<float> doubled(__m256 half) {
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), _mm512_castps256_ps512(half));
}
VEC_INLINE Vec<double> doubled(__m256d half) {
  return _mm512_permutexvar_pd(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), _mm512_castpd256_pd512(half));
}
VEC_INLINE void load_doubled(Vec<float>& out, const float* p, int pairs) {
  out = doubled(_mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << pairs) - 1u), p));
}
VEC_INLINE void load_doubled(Vec<double>& out, const double* p, int pairs) {
  out = doubled(_mm256_maskz_loadu_pd(static_cast<__mmask8>((1u << pairs) - 1u), p));
}
VEC_INLINE void load_doubled(Vec<double>& out, const float* p, int pairs) {
  out = doubled(_mm256_cvtps_pd(_mm_maskz_loadu_ps(static_cast<__mmask8>((1u << pairs) - 1u), p)));
}

// Round half to even, NaN to 0; lanes beyond [-128, 127] saturate.
VEC_INLINE __m128i to_i8(Vec<float> a) {
  return _mm512_cvtsepi32_epi8(_mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q), a.v));
}
VEC_INLINE void store_i8(int8_t* p, Vec<float> a, All) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_i8(a)); }
VEC_INLINE void store_i8(int8_t* p, Vec<float> a, int n) { _mm_mask_storeu_epi8(p, Vec<float>::first(n), to_i8(a)); }
// The larger of `most` (not negative) and |a|, a NaN being the largest: float's order is that of its bits.
VEC_INLINE Vec<float> max_abs(Vec<float> most, Vec<float> a) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff));
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(most.v), bits));
}
#else
// ---------------------------------------------------------------------------------------------------------- AVX2
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

  // Round to nearest even; a NaN stays a NaN.
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
  VEC_INLINE Vec operator+(Vec b) const { return _mm256_add_ps(v, b.v); }
  VEC_INLINE Vec operator-(Vec b) const { return _mm256_sub_ps(v, b.v); }
  VEC_INLINE Vec operator*(Vec b) const { return _mm256_mul_ps(v, b.v); }
  VEC_INLINE Vec operator/(Vec b) const { return _mm256_div_ps(v, b.v); }
};
VEC_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
VEC_INLINE Vec<float> fnma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }
VEC_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a.v, b.v); }
VEC_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a.v, b.v); }
VEC_INLINE Vec<float> round(Vec<float> a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC_INLINE Vec<float> scale2(Vec<float> a, Vec<float> n) {  // two factors, so that 2^n may be as small as a subnormal
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)));
}

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
    return _mm256_cvtps_pd(_mm_maskload_ps(p, _mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3))));
  }
  VEC_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  VEC_INLINE void store(double* p, int n) const { _mm256_maskstore_pd(p, first(n), v); }
  template <typename T> VEC_INLINE Vec rounded_to() const { return *this; }
  VEC_INLINE double sum() const {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
  VEC_INLINE Vec operator+(Vec b) const { return _mm256_add_pd(v, b.v); }
  VEC_INLINE Vec operator-(Vec b) const { return _mm256_sub_pd(v, b.v); }
  VEC_INLINE Vec operator*(Vec b) const { return _mm256_mul_pd(v, b.v); }
  VEC_INLINE Vec operator/(Vec b) const { return _mm256_div_pd(v, b.v); }
};
VEC_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
VEC_INLINE Vec<double> fnma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fnmadd_pd(a.v, b.v, c.v); }
VEC_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a.v, b.v); }
VEC_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return _mm256_min_pd(a.v, b.v); }
VEC_INLINE Vec<double> round(Vec<double> a) { return _mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC_INLINE Vec<double> scale2(Vec<double> a, Vec<double> n) {
  const __m128i whole = _mm256_cvtpd_epi32(n.v);
  const __m128i half = _mm_srai_epi32(whole, 1);
  const auto power = [](__m128i e) {
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_add_epi64(_mm256_cvtepi32_epi64(e), _mm256_set1_epi64x(1023)), 52));
  };
  return _mm256_mul_pd(_mm256_mul_pd(a.v, power(half)), power(_mm_sub_epi32(whole, half)));
}

// Adjacent pairs (x0, x1) as (x1, x0); negation of every lane in `odd` (0 or 1) position; a table entry for each pair.
VEC_INLINE Vec<float> swap_pairs(Vec<float> a) { return _mm256_permute_ps(a.v, 0xb1); }
VEC_INLINE Vec<double> swap_pairs(Vec<double> a) { return _mm256_permute_pd(a.v, 0x5); }
template <int odd> VEC_INLINE Vec<float> negate_lanes(Vec<float> a) {
  return _mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi64x(static_cast<long long>(odd ? 0x8000000000000000ull : 0x80000000ull))));
}
template <int odd> VEC_INLINE Vec<double> negate_lanes(Vec<double> a) {
  return _mm256_xor_pd(a.v, odd ? _mm256_setr_pd(0.0, -0.0, 0.0, -0.0) : _mm256_setr_pd(-0.0, 0.0, -0.0, 0.0));
}
VEC_INLINE __m128i first4(int n) { return _mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3)); }
VEC_INLINE Vec<double> doubled(__m128d half) { return _mm256_permute4x64_pd(_mm256_castpd128_pd256(half), 0x50); }
VEC_INLINE void load_doubled(Vec<float>& out, const float* p, int pairs) {
  out = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_maskload_ps(p, first4(pairs))),
                                 _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}
VEC_INLINE void load_doubled(Vec<double>& out, const double* p, int pairs) {
  out = doubled(pairs == 2 ? _mm_loadu_pd(p) : _mm_load_sd(p));
}
VEC_INLINE void load_doubled(Vec<double>& out, const float* p, int pairs) {
  out = doubled(_mm_cvtps_pd(_mm_maskload_ps(p, first4(pairs))));
}

// Round half to even, NaN to 0; lanes beyond [-128, 127] saturate.
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
// The larger of `most` (not negative) and |a|, a NaN being the largest: float's order is that of its bits.
VEC_INLINE Vec<float> max_abs(Vec<float> most, Vec<float> a) {
  const __m256i bits = _mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x7fffffff));
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(most.v), bits));
}
#endif

template <> VEC_INLINE Vec<float> Vec<float>::rounded_to<float>() const { return *this; }
template <> VEC_INLINE Vec<float> Vec<float>::rounded_to<bf16>() const { return widen(to_bf16()); }
template <> VEC_INLINE Vec<float> Vec<float>::rounded_to<f16>() const {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtph_ps(to_f16());
#else
  return _mm256_cvtph_ps(to_f16());
#endif
}

// The largest lane in the order of max_abs.
VEC_INLINE float largest_abs(Vec<float> most) {
  int32_t lanes[Vec<float>::size], top = 0;
  most.store(reinterpret_cast<float*>(lanes));
  for (int32_t lane : lanes) top = lane > top ? lane : top;
  float out;
  std::memcpy(&out, &top, 4);
  return out;
}

// Runs body(i, n) over [0, cols): whole vectors with n = All, then one partial vector with n = the lanes left. The two are
// different types so that a whole vector never takes a masked access: Zen 4 microcodes masked 16-bit stores.
template <typename V, typename F> VEC_INLINE void for_vectors(int64_t cols, const F& body) {
  int64_t i = 0;
  for (; i + V::size <= cols; i += V::size) body(i, All{});
  if (i < cols) body(i, static_cast<int>(cols - i));
}
template <typename V, typename T> VEC_INLINE V load(const T* p, All) { return V::load(p); }
template <typename V, typename T> VEC_INLINE V load(const T* p, int n) { return V::load(p, n); }
template <typename V, typename T> VEC_INLINE void store(T* p, V v, All) { v.store(p); }
template <typename V, typename T> VEC_INLINE void store(T* p, V v, int n) { v.store(p, n); }

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
