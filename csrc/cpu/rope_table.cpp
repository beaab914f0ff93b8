#include "../rope_table.h"

#include <cmath>

#include "rope.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

using V = Vec<double>;

// The low mantissa bits of `t` hold an integer. select0 returns `set` where its bit 0 is set, else `unset`. flip<k> changes the
// sign of x where its bit k is set.
#if defined(CPU_CAPABILITY_AVX512)
VEC_INLINE V select0(V t, V unset, V set) {
  return _mm512_mask_blend_pd(_mm512_test_epi64_mask(_mm512_castpd_si512(t.v), _mm512_set1_epi64(1)), unset.v, set.v);
}
template <int k> VEC_INLINE V flip(V t, V x) {
  const __m512i sign = _mm512_slli_epi64(_mm512_srli_epi64(_mm512_castpd_si512(t.v), k), 63);
  return _mm512_castsi512_pd(_mm512_xor_si512(_mm512_castpd_si512(x.v), sign));
}
VEC_INLINE V round_to_float(V x) { return _mm512_cvtps_pd(_mm512_cvtpd_ps(x.v)); }
VEC_INLINE void store_float(float* p, V x, All) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(x.v)); }
VEC_INLINE void store_float(float* p, V x, int n) { _mm256_mask_storeu_ps(p, V::first(n), _mm512_cvtpd_ps(x.v)); }
#else
VEC_INLINE V select0(V t, V unset, V set) {
  return _mm256_blendv_pd(unset.v, set.v, _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(t.v), 63)));
}
template <int k> VEC_INLINE V flip(V t, V x) {
  const __m256i sign = _mm256_slli_epi64(_mm256_srli_epi64(_mm256_castpd_si256(t.v), k), 63);
  return _mm256_xor_pd(x.v, _mm256_castsi256_pd(sign));
}
VEC_INLINE V round_to_float(V x) { return _mm256_cvtps_pd(_mm256_cvtpd_ps(x.v)); }
VEC_INLINE void store_float(float* p, V x, All) { _mm_storeu_ps(p, _mm256_cvtpd_ps(x.v)); }
VEC_INLINE void store_float(float* p, V x, int n) { _mm_maskstore_ps(p, first4(n), _mm256_cvtpd_ps(x.v)); }
#endif

constexpr double kLargest = 1 << 30;  // larger angles are left to the exact reduction of the C library

// cos and sin for |x| <= kLargest, within 2e-15. x = n pi/2 + r with |r| <= pi/4: Taylor polynomials in r give cos r and sin r,
// and n decides which of the two is cos x, which is sin x, and their signs. r is x minus n times each of three parts of pi/2,
// by fma; the first subtraction is exact.
VEC_INLINE void cos_sin(V x, V& cos, V& sin) {
  const V t = fma(x, V(0.63661977236758134), V(0x1.8p52));  // n = round(x * 2/pi) stands in the low bits of t
  const V n = t - V(0x1.8p52);
  V r = fnma(n, V(0x1.921fb54442d18p+0), x);
  r = fnma(n, V(0x1.1a62633145c07p-54), r);
  r = fnma(n, V(-0x1.f1976b7ed8fbcp-110), r);
  const V r2 = r * r;
  V s = fma(r2, V(-1.0 / 1307674368000.0), V(1.0 / 6227020800.0));
  V c = fma(r2, V(-1.0 / 87178291200.0), V(1.0 / 479001600.0));
  s = fma(s, r2, V(-1.0 / 39916800.0));
  c = fma(c, r2, V(-1.0 / 3628800.0));
  s = fma(s, r2, V(1.0 / 362880.0));
  c = fma(c, r2, V(1.0 / 40320.0));
  s = fma(s, r2, V(-1.0 / 5040.0));
  c = fma(c, r2, V(-1.0 / 720.0));
  s = fma(s, r2, V(1.0 / 120.0));
  c = fma(c, r2, V(1.0 / 24.0));
  s = fma(s, r2, V(-1.0 / 6.0));
  c = fma(c, r2, V(-0.5));
  s = fma(s * r2, r, r);
  c = fma(c, r2, V(1.0));
  cos = flip<0>(t, flip<1>(t, select0(t, c, s)));
  sin = flip<1>(t, select0(t, s, c));
}

struct Row {
  const double* inv_freq;
  float *cos, *sin;
  double position, magnitude;
  bool float32_angles;
};

template <typename N> VEC_INLINE void columns(const Row& row, int64_t i, N n) {
  V x = V(row.position) * load<V>(row.inv_freq + i, n);  // a product of two floats is exact in double
  if (row.float32_angles) x = round_to_float(x);
  V cos, sin;
  cos_sin(x, cos, sin);
  if (row.float32_angles) {
    cos = round_to_float(cos);
    sin = round_to_float(sin);
  }
  store_float(row.cos + i, cos * V(row.magnitude), n);
  store_float(row.sin + i, sin * V(row.magnitude), n);
}

// One element by the C library, for angles larger than kLargest.
VEC_INLINE void column(const Row& row, int64_t i) {
  if (row.float32_angles) {
    const float angle = static_cast<float>(row.position) * static_cast<float>(row.inv_freq[i]);
    row.cos[i] = std::cos(angle) * static_cast<float>(row.magnitude);
    row.sin[i] = std::sin(angle) * static_cast<float>(row.magnitude);
  } else {
    row.cos[i] = static_cast<float>(std::cos(row.position * row.inv_freq[i]) * row.magnitude);
    row.sin[i] = static_cast<float>(std::sin(row.position * row.inv_freq[i]) * row.magnitude);
  }
}

}  // namespace

void rope_table_fwd(const RopeTableFwd& a, int64_t begin, int64_t end) {
  double largest = 0;  // the largest |inv_freq|
  for (int64_t i = 0; i < a.half; ++i) {
    const double size = std::fabs(a.inv_freq[i]);
    largest = size > largest ? size : largest;
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t index = index_at(a.positions, a.positions_dtype, i);
    Row row{a.inv_freq, a.cos + i * a.half, a.sin + i * a.half, static_cast<double>(index) / a.divisor, a.magnitude,
            a.float32_angles};
    if (a.float32_angles) {
      row.position = static_cast<float>(index) / static_cast<float>(a.divisor);
      row.magnitude = static_cast<float>(a.magnitude);
    }
    if (std::fabs(row.position) * largest < kLargest) {
      for_vectors<V, Single>(a.half, [&](int64_t c, auto n) VEC_LAMBDA { columns(row, c, n); });
    } else {
      for (int64_t c = 0; c < a.half; ++c) column(row, c);
    }
  }
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
