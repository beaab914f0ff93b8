// Packing of rows of tensors into the operands of product.h, and back:
//   pack_rows              row by row: makes A of rows along which k runs
//   pack_lanes             transposed, so that rows become lanes: makes B of rows along which k runs
//   pack_steps             rows become steps of k, pairs of rows where an element is a pair: makes B of rows over which k runs
//   pack_steps_transposed  the transpose of pack_steps: makes A of rows over which k runs
//
// The argument row(i) returns the address of row i. The rows may have another storage type than the policy's element: where the
// policy is float, bfloat16 and float16 become float. int8 becomes the policy's type, which is exact.
#pragma once
#include "product.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

// ---------------------------------------------------------------------------------------------- square transposition
#if defined(CPU_CAPABILITY_AVX512)
template <int kParts, typename V, typename F> VEC_INLINE void transpose_quarters(V (&t)[4 * kParts], V (&r)[4 * kParts],
                                                                                 const F& shuffle) {
#pragma GCC unroll 4
  for (int q = 0; q < kParts; ++q) {
    const auto low0 = shuffle(t[q].v, t[kParts + q].v, std::integral_constant<int, 0x44>{});
    const auto high0 = shuffle(t[q].v, t[kParts + q].v, std::integral_constant<int, 0xee>{});
    const auto low1 = shuffle(t[2 * kParts + q].v, t[3 * kParts + q].v, std::integral_constant<int, 0x44>{});
    const auto high1 = shuffle(t[2 * kParts + q].v, t[3 * kParts + q].v, std::integral_constant<int, 0xee>{});
    r[q].v = shuffle(low0, low1, std::integral_constant<int, 0x88>{});
    r[kParts + q].v = shuffle(low0, low1, std::integral_constant<int, 0xdd>{});
    r[2 * kParts + q].v = shuffle(high0, high1, std::integral_constant<int, 0x88>{});
    r[3 * kParts + q].v = shuffle(high0, high1, std::integral_constant<int, 0xdd>{});
  }
}
VEC_INLINE void transpose(Vec<float> (&r)[16]) {
  Vec<float> t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[i].v, r[i + 1].v));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(r[i].v, r[i + 1].v));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[i + 2].v, r[i + 3].v));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(r[i + 2].v, r[i + 3].v));
    t[i].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    t[i + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    t[i + 2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    t[i + 3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  transpose_quarters<4>(t, r, [](__m512 a, __m512 b, auto how) VEC_LAMBDA { return _mm512_shuffle_f32x4(a, b, how()); });
}
VEC_INLINE void transpose(Vec<double> (&r)[8]) {
  Vec<double> t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i].v = _mm512_unpacklo_pd(r[i].v, r[i + 1].v);
    t[i + 1].v = _mm512_unpackhi_pd(r[i].v, r[i + 1].v);
  }
  transpose_quarters<2>(t, r, [](__m512d a, __m512d b, auto how) VEC_LAMBDA { return _mm512_shuffle_f64x2(a, b, how()); });
}
#else
VEC_INLINE void transpose(Vec<float> (&r)[8]) {
  Vec<float> t[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r[i].v, r[i + 1].v));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(r[i].v, r[i + 1].v));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(r[i + 2].v, r[i + 3].v));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(r[i + 2].v, r[i + 3].v));
    t[i].v = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    t[i + 1].v = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    t[i + 2].v = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    t[i + 3].v = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    r[q].v = _mm256_permute2f128_ps(t[q].v, t[4 + q].v, 0x20);
    r[4 + q].v = _mm256_permute2f128_ps(t[q].v, t[4 + q].v, 0x31);
  }
}
VEC_INLINE void transpose(Vec<double> (&r)[4]) {
  const __m256d a = _mm256_unpacklo_pd(r[0].v, r[1].v), b = _mm256_unpackhi_pd(r[0].v, r[1].v);
  const __m256d c = _mm256_unpacklo_pd(r[2].v, r[3].v), d = _mm256_unpackhi_pd(r[2].v, r[3].v);
  r[0].v = _mm256_permute2f128_pd(a, c, 0x20);
  r[1].v = _mm256_permute2f128_pd(b, d, 0x20);
  r[2].v = _mm256_permute2f128_pd(a, c, 0x31);
  r[3].v = _mm256_permute2f128_pd(b, d, 0x31);
}
#endif

// --------------------------------------------------------------------------------- elements of a policy out of a row
// row() loads a vector of elements of a row from `e` on, or n elements and zeros. rows() makes pairs of the elements of two
// rows. A vector of bfloat16 pairs is held as the vector of floats with the same bits.
template <typename P> struct Elements {  // for policies whose element is one number
  using Acc = typename P::Acc;
  using V = Vec<Acc>;
  template <typename T, typename N> static VEC_INLINE V row(const T* p, int64_t e, N n) { return load<V>(p + e, n); }
  template <typename N> static VEC_INLINE V row(const int8_t* p, int64_t e, N n) {
    Acc lanes[V::size] = {};
    int count = V::size;
    if constexpr (std::is_same_v<N, int>) count = n;
    for (int i = 0; i < count; ++i) lanes[i] = static_cast<Acc>(p[e + i]);
    return V::load(lanes);
  }
};

#if defined(CPU_CAPABILITY_AVX512_BF16)
template <> struct Elements<Pairs> {
  using V = Vec<float>;
  static VEC_INLINE V bits(__m512i x) { return _mm512_castsi512_ps(x); }
  template <typename N> static VEC_INLINE V row(const bf16* p, int64_t e, N n) {
    return load<V>(reinterpret_cast<const float*>(p) + e, n);
  }
  template <typename N> static VEC_INLINE V row(const int8_t* p, int64_t e, N n) {
    __m256i bytes;
    if constexpr (std::is_same_v<N, int>) {
      bytes = _mm256_maskz_loadu_epi16(V::first(n), p + 2 * e);
    } else {
      bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2 * e));
    }
    const __m512i words = _mm512_cvtepi8_epi16(bytes);
    return both(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16), _mm512_srai_epi32(words, 16));
  }
  // A vector of pairs (a[e + i], b[e + i]); without a row b (nullptr) the second of each pair is 0.
  template <typename N> static VEC_INLINE V rows(const bf16* a, const bf16* b, int64_t e, N n) {
    const __m512i low = _mm512_cvtepu16_epi32(words(a + e, n));
    if (b == nullptr) return bits(low);
    return bits(_mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(words(b + e, n)), 16)));
  }
  template <typename N> static VEC_INLINE V rows(const int8_t* a, const int8_t* b, int64_t e, N n) {
    const __m512i low = _mm512_cvtepi8_epi32(bytes(a + e, n));
    return both(low, b == nullptr ? _mm512_setzero_si512() : _mm512_cvtepi8_epi32(bytes(b + e, n)));
  }
  // Two vectors of pairs (a[e + i], b[e + i]), in the order that one unpack instruction each makes: quarter q of x holds
  // elements 8 q to 8 q + 3, quarter q of y elements 8 q + 4 to 8 q + 7.
  static VEC_INLINE void interleaved_rows(const bf16* a, const bf16* b, int64_t e, V& x, V& y) {
    const __m512i first = _mm512_loadu_si512(a + e);
    const __m512i second = b == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(b + e);
    x = bits(_mm512_unpacklo_epi16(first, second));
    y = bits(_mm512_unpackhi_epi16(first, second));
  }

 private:
  static VEC_INLINE V both(__m512i low, __m512i high) {  // small integers are exact in bfloat16
    const __m512i a = _mm512_castps_si512(_mm512_cvtepi32_ps(low)), b = _mm512_castps_si512(_mm512_cvtepi32_ps(high));
    return bits(_mm512_or_si512(_mm512_srli_epi32(a, 16), b));
  }
  static VEC_INLINE __m256i words(const bf16* p, All) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static VEC_INLINE __m256i words(const bf16* p, int n) { return _mm256_maskz_loadu_epi16(V::first(n), p); }
  static VEC_INLINE __m128i bytes(const int8_t* p, All) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static VEC_INLINE __m128i bytes(const int8_t* p, int n) { return _mm_maskz_loadu_epi8(V::first(n), p); }
};
#endif

#if defined(CPU_CAPABILITY_AVX512)
// Puts two vectors of sums that are in the order of interleaved_rows into the order of the elements.
VEC_INLINE void undo_interleaved_rows(Vec<float>& x, Vec<float>& y) {
  const __m512 low = _mm512_shuffle_f32x4(x.v, y.v, 0x44), high = _mm512_shuffle_f32x4(x.v, y.v, 0xee);
  x.v = _mm512_shuffle_f32x4(low, low, 0xd8);
  y.v = _mm512_shuffle_f32x4(high, high, 0xd8);
}
#endif

#if defined(CPU_CAPABILITY_AMX)
template <> struct Elements<Tiles> : Elements<Pairs> {};
#endif

// How much of a partial vector of n lanes is stored: n lanes, but for AMX tiles the whole vector, padded with zeros.
template <typename P, typename N> VEC_INLINE auto padded(N n) {
  if constexpr (kTiles<P>) return All{};
  else return n;
}

template <typename P> VEC_INLINE typename P::Acc* as_acc(typename P::Element* p) {
  return reinterpret_cast<typename P::Acc*>(p);
}

// ------------------------------------------------------------------------------------------------------- whole blocks
// to[i][e] = element e of row i.
template <typename P, typename F>
VEC_INLINE void pack_rows(int64_t rows, int64_t d, const F& row, typename P::Element* to, int64_t stride) {
  using V = Vec<typename P::Acc>;
  for (int64_t i = 0; i < rows; ++i) {
    const auto* from = row(i);
    auto* out = as_acc<P>(to + i * stride);
    for_vectors<V, Single>(d / P::step, [&](int64_t e, auto n) VEC_LAMBDA {
      store(out + e, Elements<P>::row(from, e, n), padded<P>(n));
    });
  }
}

// to[i / step][e] = element e of rows i to i + step - 1 (with step 2 a pair); rows missing at the end are 0.
template <typename P, typename F>
VEC_INLINE void pack_steps(int64_t rows, int64_t d, const F& row, typename P::Element* to, int64_t stride) {
  using V = Vec<typename P::Acc>;
  if constexpr (P::step == 1) {
    pack_rows<P>(rows, d, row, to, stride);
  } else {
    const int64_t end = (rows + P::depth - 1) / P::depth * P::depth;
    for (int64_t i = 0; i < end; i += 2) {
      auto* out = as_acc<P>(to + i / 2 * stride);
      if (i >= rows) {
        for_vectors<V, Single>(d, [&](int64_t e, auto n) VEC_LAMBDA { store(out + e, V(0), n); });
        continue;
      }
      const auto *a = row(i), *b = i + 1 < rows ? row(i + 1) : nullptr;
      for_vectors<V, Single>(d, [&](int64_t e, auto n) VEC_LAMBDA { store(out + e, Elements<P>::rows(a, b, e, n), n); });
    }
  }
}

// to[e][i] = element e of row i. Lanes beyond the last row, up to a whole vector, are 0.
template <typename P, typename F>
VEC_INLINE void pack_lanes(int64_t rows, int64_t d, const F& row, typename P::Element* to, int64_t stride) {
  using V = Vec<typename P::Acc>;
  for (int64_t i = 0; i < rows; i += V::size) {
    const int count = static_cast<int>(rows - i < V::size ? rows - i : V::size);
    decltype(row(0)) from[V::size];
    for (int u = 0; u < V::size; ++u) from[u] = row(i + (u < count ? u : 0));
    for_vectors<V, Single>(d / P::step, [&](int64_t e, auto n) VEC_LAMBDA {
      V r[V::size];
      auto* out = as_acc<P>(to + e * stride + i);
      if constexpr (!std::is_same_v<decltype(n), int>) {
        if (count == V::size) {  // the usual case, in registers
#pragma GCC unroll 16
          for (int u = 0; u < V::size; ++u) {
            r[u] = Elements<P>::row(from[u], e, n);
            _mm_prefetch(reinterpret_cast<const char*>(from[u] + (e + 2 * V::size) * P::step), _MM_HINT_T0);
          }
          transpose(r);
#pragma GCC unroll 16
          for (int u = 0; u < V::size; ++u) r[u].store(out + u * stride);
          return;
        }
      }
      for (int u = 0; u < count; ++u) r[u] = Elements<P>::row(from[u], e, n);
      transpose(r);
      int steps = V::size;
      if constexpr (std::is_same_v<decltype(n), int> && !kTiles<P>) steps = n;
      for (int u = 0; u < steps; ++u) r[u].store(out + u * stride);
    });
  }
}

// to[e][i / 2] = the pair of element e of rows i and i + 1. Rows of `to` beyond d, up to a whole vector, and elements of rows i
// that are missing at the end are 0.
template <typename P, typename F>
VEC_INLINE void pack_steps_transposed(int64_t rows, int64_t d, const F& row, typename P::Element* to, int64_t stride) {
  using V = Vec<typename P::Acc>;
  for (int64_t i = 0; i < rows; i += 2 * V::size) {
    for_vectors<V, Single>(d, [&](int64_t e, auto n) VEC_LAMBDA {
      V r[V::size];
      for (int u = 0; u < V::size; ++u) {
        const int64_t at = i + 2 * u;
        r[u] = at < rows ? Elements<P>::rows(row(at), at + 1 < rows ? row(at + 1) : nullptr, e, n) : V(0);
      }
      transpose(r);
      for (int u = 0; u < V::size; ++u) r[u].store(as_acc<P>(to + (e + u) * stride + i / 2));
    });
  }
}

// to[j][i] = from[i][j] for i < rows, and 0 for rows <= i < all. `all` and `columns` are multiples of a vector's lanes.
template <typename P>
VEC_INLINE void transpose_block(int64_t rows, int64_t all, int64_t columns, typename P::Element* from, int64_t stride,
                     typename P::Element* to, int64_t to_stride) {
  using V = Vec<typename P::Acc>;
  for (int64_t i = 0; i < all; i += V::size) {
    for (int64_t j = 0; j < columns; j += V::size) {
      V r[V::size];
      for (int u = 0; u < V::size; ++u) r[u] = i + u < rows ? V::load(as_acc<P>(from + (i + u) * stride + j)) : V(0);
      transpose(r);
      for (int u = 0; u < V::size; ++u) r[u].store(as_acc<P>(to + (j + u) * to_stride + i));
    }
  }
}

// row(i)[e] = from[e][i] * factor[i], rounded to the storage type: the reverse of pack_lanes.
template <typename Acc, typename F>
VEC_INLINE void unpack_lanes(int64_t rows, int64_t d, const Acc* from, int64_t stride, const Acc* factor, const F& row) {
  using V = Vec<Acc>;
  for (int64_t i = 0; i < rows; i += V::size) {
    const int count = static_cast<int>(rows - i < V::size ? rows - i : V::size);
    const V times = V::load(factor + i);
    for_vectors<V, Single>(d, [&](int64_t e, auto n) VEC_LAMBDA {
      V r[V::size];
      int steps = V::size;
      if constexpr (std::is_same_v<decltype(n), int>) steps = n;
      for (int u = 0; u < steps; ++u) r[u] = V::load(from + (e + u) * stride + i) * times;
      transpose(r);
      for (int u = 0; u < count; ++u) store(row(i + u) + e, r[u], n);
    });
  }
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
