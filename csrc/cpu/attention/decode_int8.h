// For decode.h: products of bfloat16 queries and weights with int8 keys and values, computed in integers, so that no byte of
// the cache is converted to bfloat16. (prefill.h converts the bytes once for its many lanes. Its results agree with these
// within rounding, not in every bit.)
//
// Queries and weights are scaled to 16-bit integers, so that the largest of a lane (for weights: of a lane's block) is 32767,
// and split into bytes: x = 256 (high - 128) + low, both in [0, 255], which VPDPBUSD multiplies with signed bytes. The sum of
// the signed bytes themselves accounts for the 128. A product is exact in 32 bits, because |x| 127 d and |x| 127 kBlock are
// below 2^31. The remaining error is 2^-16 of the largest query or weight, where that of bfloat16 is 2^-9 of each.
#pragma once
#include "common.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr int64_t kInt8Keys = 32;  // the rows of values whose products are added before the accumulators are stored

#if defined(CPU_CAPABILITY_AVX512_BF16)
constexpr bool kIntegerProducts = true;
template <typename T, typename S> constexpr bool kInt8 = is_bf16<T> && std::is_same_v<S, int8_t>;

struct Int8Scratch {
  int64_t width;
  uint8_t *q_high, *q_low;   // [lanes][width]: the bytes of the queries as integers
  uint8_t *p_high, *p_low;   // [lanes][kBlock]: the bytes of the weights as integers
  float *q_scale, *p_scale;  // [lanes]: the factors by which the integers are the queries and the weights
  int32_t* o;                // [lanes][width]

  VEC_INLINE void allocate(Arena& arena, int64_t lanes, int64_t row) {
    width = row;
    arena.take(q_high, lanes * width);
    arena.take(q_low, lanes * width);
    arena.take(p_high, lanes * kBlock);
    arena.take(p_low, lanes * kBlock);
    arena.take(q_scale, lanes);
    arena.take(p_scale, lanes);
    arena.take(o, lanes * width);
  }
};

// Splits round(x * times) into the bytes `high` and `low` (see the top of the file), for one vector.
VEC_INLINE void split_bytes(Vec<float> x, Vec<float> times, uint8_t* high, uint8_t* low) {
  const __m512i whole = _mm512_cvtps_epi32((x * times).v);
  const __m512i upper = _mm512_add_epi32(_mm512_srai_epi32(whole, 8), _mm512_set1_epi32(128));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(upper));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(whole));
}

// The scale that maps numbers up to `most` to integers up to 32767, and its inverse. A NaN or infinity makes the scale NaN.
VEC_INLINE float scale_of(float most, float& inverse) {
  inverse = most > 0 ? 32767.0f / most : 0.0f;
  return most * (1.0f / 32767.0f) + (most - most);
}

template <typename T> void split_queries(const T* q, int64_t d, const Int8Scratch& to, int64_t lane) {
  using V = Vec<float>;
  V most(0.0f);
  for_vectors<V, Single>(d, [&](int64_t e, auto n) VEC_LAMBDA { most = max_abs(most, load<V>(q + e, n)); });
  float inverse;
  to.q_scale[lane] = scale_of(largest_abs(most), inverse);
  for (int64_t e = 0; e < d; e += V::size) {
    const int n = static_cast<int>(lesser(d - e, V::size));
    split_bytes(V::load(q + e, n), V(inverse), to.q_high + lane * to.width + e, to.q_low + lane * to.width + e);
  }
}

// Splits the products of a lane's n weights (0 beyond n) and the scales of the values into bytes.
VEC_INLINE void split_weights(const float* weights, const float* scales, int64_t n, const Int8Scratch& to,
                                 int64_t lane) {
  using V = Vec<float>;
  V most(0.0f);
  const auto product = [&](int64_t i) VEC_LAMBDA { return V::load(weights + i) * V::load(scales + i); };
  for (int64_t i = 0; i < n; i += V::size) most = max_abs(most, product(i));
  float inverse;
  to.p_scale[lane] = scale_of(largest_abs(most), inverse);
  for (int64_t i = 0; i < n; i += V::size) {
    split_bytes(product(i), V(inverse), to.p_high + lane * kBlock + i, to.p_low + lane * kBlock + i);
  }
}

VEC_INLINE __m512i four_bytes(const uint8_t* p) {
  int32_t x;
  std::memcpy(&x, p, sizeof(x));
  return _mm512_set1_epi32(x);
}
// The product with x = 256 (high - 128) + low, from the products with the bytes `high` and `low` and the sum of the signed
// bytes.
VEC_INLINE __m512i whole_of(__m512i high, __m512i low, __m512i sum) {
  return _mm512_add_epi32(_mm512_slli_epi32(_mm512_sub_epi32(high, _mm512_slli_epi32(sum, 7)), 8), low);
}

// s[r][i] = the integer product of query r and key i, as a float, for 16 keys.
template <int kRows>
__attribute__((noinline)) void int8_scores(const int8_t* const* keys, int64_t offset, const Int8Scratch& w, int64_t lane,
                                           int64_t d, float* s) {
  using V = Vec<float>;
  __m512i high[kRows], low[kRows], sum = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) high[r] = low[r] = _mm512_setzero_si512();
  const uint8_t *q_high = w.q_high + lane * w.width, *q_low = w.q_low + lane * w.width;
  for_vectors<V, Single>(d / 4, [&](int64_t e, auto n) VEC_LAMBDA {
    V k[V::size];
#pragma GCC unroll 16
    for (int i = 0; i < V::size; ++i) {
      prefetch_line(keys[kAhead + i] + offset + 4 * e);
      k[i] = load<V>(reinterpret_cast<const float*>(keys[i] + offset) + e, n);
    }
    transpose(k);
    const auto step = [&](int u) VEC_LAMBDA {
      const __m512i key = _mm512_castps_si512(k[u].v);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), key);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        high[r] = _mm512_dpbusd_epi32(high[r], four_bytes(q_high + r * w.width + 4 * (e + u)), key);
        low[r] = _mm512_dpbusd_epi32(low[r], four_bytes(q_low + r * w.width + 4 * (e + u)), key);
      }
    };
    if constexpr (std::is_same_v<decltype(n), int>) {
      for (int u = 0; u < n; ++u) step(u);
    } else {
#pragma GCC unroll 16
      for (int u = 0; u < V::size; ++u) step(u);
    }
  });
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(s + r * kBlock, _mm512_cvtepi32_ps(whole_of(high[r], low[r], sum)));
}

// Adds to w.o[lane + r] (or sets it, where `at` is 0) the integer product of the weights of keys [at, at + n) and n rows of
// values, for half of the 64 elements from `first` on: of the four vectors of w.o for these, 0 and 1, or with `half` 2 and 3.
// Quarter q of vector j holds elements 16 q + 4 j to 16 q + 4 j + 3.
template <int kRows, bool half>
VEC_INLINE void int8_values_half(const int8_t* const* values, int64_t offset, int64_t n, const Int8Scratch& w,
                                 int64_t lane, int64_t at, int64_t first, int64_t elements) {
  const uint8_t *p_high = w.p_high + lane * kBlock + at, *p_low = w.p_low + lane * kBlock + at;
  const __mmask64 in_row = ~__mmask64(0) >> (64 - elements);
  __m512i high[kRows][2], low[kRows][2], sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) high[r][0] = high[r][1] = low[r][0] = low[r][1] = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 4) {  // rows beyond n have weights of 0: any row will do
    __m512i v[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const int8_t* row = values[i + u] + offset + first;
      if (!half) prefetch_line(values[kAhead + i + u] + offset + first);
      v[u] = elements == 64 ? _mm512_loadu_si512(row) : _mm512_maskz_loadu_epi8(in_row, row);
    }
    const __m512i a = half ? _mm512_unpackhi_epi8(v[0], v[1]) : _mm512_unpacklo_epi8(v[0], v[1]);
    const __m512i b = half ? _mm512_unpackhi_epi8(v[2], v[3]) : _mm512_unpacklo_epi8(v[2], v[3]);
    const __m512i four[2] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) sum[j] = _mm512_dpbusd_epi32(sum[j], _mm512_set1_epi8(1), four[j]);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i upper = four_bytes(p_high + r * kBlock + i), lower = four_bytes(p_low + r * kBlock + i);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        high[r][j] = _mm512_dpbusd_epi32(high[r][j], upper, four[j]);
        low[r][j] = _mm512_dpbusd_epi32(low[r][j], lower, four[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      int32_t* o = w.o + (lane + r) * w.width + first + 16 * (2 * half + j);
      const __m512i before = at > 0 ? _mm512_loadu_si512(o) : _mm512_setzero_si512();
      _mm512_storeu_si512(o, _mm512_add_epi32(before, whole_of(high[r][j], low[r][j], sum[j])));
    }
  }
}

template <int kRows>
__attribute__((noinline)) void int8_values(const int8_t* const* values, int64_t offset, int64_t n, const Int8Scratch& w,
                                           int64_t lane, int64_t at, int64_t d) {
  for (int64_t first = 0; first < d; first += 64) {  // vectors 0 and 1 of w.o, then 2 and 3
    int8_values_half<kRows, false>(values, offset, n, w, lane, at, first, lesser(64, d - first));
    int8_values_half<kRows, true>(values, offset, n, w, lane, at, first, lesser(64, d - first));
  }
}

// o = factor * o + the block's weighted values, converted from integers.
VEC_INLINE void add_int8_values(const Int8Scratch& w, int64_t lane, float factor, bool opens, float* o) {
  using V = Vec<float>;
  for (int64_t e = 0; e < w.width; e += V::size) {
    const V whole = _mm512_cvtepi32_ps(_mm512_loadu_si512(w.o + lane * w.width + e));
    const V before = opens ? V(0.0f) : V::load(o + e) * V(factor);
    fma(whole, V(w.p_scale[lane]), before).store(o + e);
  }
}

// Brings a row of o from the order of int8_values into the order of the elements.
VEC_INLINE void in_order_of_elements(float* o, int64_t width) {
  using V = Vec<float>;
  for (int64_t e = 0; e < width; e += 64) {
    V t[4], r[4];
    for (int j = 0; j < 4; ++j) t[j] = V::load(o + e + 16 * j);
    transpose_quarters<1>(t, r, [](__m512 a, __m512 b, auto how) VEC_LAMBDA { return _mm512_shuffle_f32x4(a, b, how()); });
    for (int j = 0; j < 4; ++j) r[j].store(o + e + 16 * j);
  }
}
#else
constexpr bool kIntegerProducts = false;
template <typename T, typename S> constexpr bool kInt8 = false;
struct Int8Scratch {
  VEC_INLINE void allocate(Arena&, int64_t, int64_t) {}
};
template <int kRows, typename... Args> void int8_scores(Args...);  // declared for decode.h, never called
template <int kRows, typename... Args> void int8_values(Args...);
#endif

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
