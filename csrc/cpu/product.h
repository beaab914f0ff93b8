// The matrix product of the attention kernels: C[m][n] = start + sum over k of A(m, k) * B[k][n].
//
// A's elements are broadcast from memory, at any row and step stride and any alignment; B is packed in rows of lanes; C is
// held in registers while k runs. Every element of C is one sequential chain over k, so that no result depends on how the
// product was cut into tiles. A policy says what an element is:
//   Pairs  two bfloat16 that follow each other along k (one 32-bit element), float accumulators; AVX512_BF16 build only.
//          Its products flush subnormals to zero.
//   Real<float>, Real<double>  one number
//   Tiles  Pairs multiplied in AMX tiles; AMX build only (product_amx.h). An element of C is then a chain of sums of 32.
// MatrixOf<T> is the policy in which this build multiplies tensors of storage type T: bfloat16 and float16 that have no
// products of their own are converted to float when they are packed.
#pragma once
#include "vec.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

template <typename T> struct Real {
  using Element = T;
  using Acc = T;
  static constexpr int step = 1;   // indices of k in one element
  static constexpr int depth = 1;  // indices of k of which operands hold a multiple, filled up with zeros
  struct Lanes { Vec<T> v; };
  static VEC_INLINE Lanes broadcast(const char* p) {
    T x;
    std::memcpy(&x, p, sizeof(T));
    return {Vec<T>(x)};
  }
  static VEC_INLINE Lanes load(const T* p) { return {Vec<T>::load(p)}; }
  static VEC_INLINE Vec<T> add_product(Vec<T> c, Lanes a, Lanes b) { return fma(a.v, b.v, c); }
};

#if defined(CPU_CAPABILITY_AVX512_BF16)
struct Pairs {
  using Element = uint32_t;
  using Acc = float;
  static constexpr int step = 2, depth = 2;
  struct Lanes { __m512i v; };
  static VEC_INLINE Lanes broadcast(const char* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof(x));
    return {_mm512_set1_epi32(x)};
  }
  static VEC_INLINE Lanes load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  static VEC_INLINE Vec<float> add_product(Vec<float> c, Lanes a, Lanes b) {
    return _mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v));
  }
};
#if defined(CPU_CAPABILITY_AMX)
struct Tiles : Pairs { static constexpr int depth = 32; };
template <typename T> using pairs_t = Tiles;
#else
template <typename T> using pairs_t = Pairs;
#endif
template <typename T> struct MatrixOf { using type = std::conditional_t<is_bf16<T>, pairs_t<T>, Real<acc_t<T>>>; };
#else
template <typename T> struct MatrixOf { using type = Real<acc_t<T>>; };
#endif
template <typename T> using matrix_t = typename MatrixOf<T>::type;
template <typename P> constexpr bool kTiles = P::depth > P::step;

template <typename P> VEC_INLINE typename P::Lanes lanes_of(Vec<typename P::Acc> bits) {  // elements held as a vector
  if constexpr (P::step == 1) return {bits};
  else return {_mm512_castps_si512(bits.v)};
}

// Register tile: kTileRows x kTileVectors accumulators.
constexpr int kTileRows = 6;
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
template <typename P> constexpr int64_t kPanel = kTileVectors * Vec<typename P::Acc>::size;  // B's natural row of lanes

// Where the chains begin: at 0, at C, or at factor[n] * C; `apart`: at 0, and C is added at their end; `joined`: at 0, and
// factor[n] * C is (no tiles); `exact`: at 0, C is added, and what that rounded off is added to `rest` (no tiles).
enum class Start { zero, sum, scaled, apart, joined, exact };

// Strides of A in bytes, all others in elements.
template <typename P> struct ProductArgs {
  const void* a;
  int64_t a_row_bytes, a_step_bytes;
  const typename P::Element* b;  // [k][b_stride]
  int64_t b_stride;
  typename P::Acc* c;  // [m][c_stride]
  int64_t c_stride;
  int64_t m, n, k;  // n: a multiple of the lanes of a vector; k: in elements (pairs)
  const typename P::Acc* factor = nullptr;  // [n], with Start::scaled and Start::joined
  int64_t rest = 0;                         // where it lies beyond c, with Start::exact
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)

#if defined(CPU_CAPABILITY_AMX)
#include "product_amx.h"
#endif

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

#if !defined(CPU_CAPABILITY_AMX)
// Around a unit's products.
VEC_INLINE void begin_tiles() {}
VEC_INLINE void end_tiles() {}
#endif

template <typename P, Start start, int kRows, int kVectors>
VEC_INLINE void product_tile(const ProductArgs<P>& p, const char* a, const typename P::Element* b, typename P::Acc* c,
                             const typename P::Acc* factor) {
  using V = Vec<typename P::Acc>;
  V acc[kRows][kVectors];
  if constexpr (start == Start::sum || start == Start::scaled) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      V scale;
      if constexpr (start == Start::scaled) scale = V::load(factor + j * V::size);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        acc[i][j] = V::load(c + i * p.c_stride + j * V::size);
        if constexpr (start == Start::scaled) acc[i][j] = acc[i][j] * scale;
      }
    }
  }
  for (int64_t k = 0; k < p.k; ++k) {
    typename P::Lanes lanes[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) lanes[j] = P::load(b + j * V::size);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const typename P::Lanes one = P::broadcast(a + i * p.a_row_bytes);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] = P::add_product(acc[i][j], one, lanes[j]);
    }
    a += p.a_step_bytes;
    b += p.b_stride;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      auto* out = c + i * p.c_stride + j * V::size;
      if constexpr (start == Start::apart) acc[i][j] = V::load(out) + acc[i][j];
      if constexpr (start == Start::exact) {  // Knuth's sum of two numbers
        const V old = V::load(out), sum = old + acc[i][j], added = sum - old;
        (V::load(out + p.rest) + ((old - (sum - added)) + (acc[i][j] - added))).store(out + p.rest);
        acc[i][j] = sum;
      }
      if constexpr (start == Start::joined) acc[i][j] = fma(V::load(factor + j * V::size), V::load(out), acc[i][j]);
      acc[i][j].store(out);
    }
  }
}

template <typename P, Start start, int kRows>
__attribute__((noinline)) void product_rows(const ProductArgs<P>& p, const char* a, const typename P::Element* b,
                                            typename P::Acc* c, const typename P::Acc* factor, int vectors) {
  switch (vectors) {
    case 1: return product_tile<P, start, kRows, 1>(p, a, b, c, factor);
    case 2: return product_tile<P, start, kRows, 2>(p, a, b, c, factor);
#if defined(CPU_CAPABILITY_AVX512)
    case 3: return product_tile<P, start, kRows, 3>(p, a, b, c, factor);
    case 4: return product_tile<P, start, kRows, 4>(p, a, b, c, factor);
#endif
  }
}

template <typename P, Start start> void product(const ProductArgs<P>& p) {
#if defined(CPU_CAPABILITY_AMX)
  if constexpr (kTiles<P>) return product_amx<P, start>(p);
#endif
  constexpr int64_t lanes = Vec<typename P::Acc>::size, panel = kPanel<P>;
  const int64_t tiles = (p.m + kTileRows - 1) / kTileRows;  // rows shared out evenly: no tile is left with one or two
  for (int64_t j = 0; j < p.n; j += panel) {
    const int vectors = static_cast<int>((p.n - j < panel ? p.n - j : panel) / lanes);
    const auto* b = p.b + j;
    const auto* factor = p.factor + j;
    for (int64_t t = 0, i = 0; t < tiles; ++t) {
      const int64_t rows = p.m / tiles + (t < p.m % tiles);
      const char* a = static_cast<const char*>(p.a) + i * p.a_row_bytes;
      auto* c = p.c + i * p.c_stride + j;
      switch (rows) {
        case 1: product_rows<P, start, 1>(p, a, b, c, factor, vectors); break;
        case 2: product_rows<P, start, 2>(p, a, b, c, factor, vectors); break;
        case 3: product_rows<P, start, 3>(p, a, b, c, factor, vectors); break;
        case 4: product_rows<P, start, 4>(p, a, b, c, factor, vectors); break;
        case 5: product_rows<P, start, 5>(p, a, b, c, factor, vectors); break;
        default: product_rows<P, start, 6>(p, a, b, c, factor, vectors); break;
      }
      i += rows;
    }
  }
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
