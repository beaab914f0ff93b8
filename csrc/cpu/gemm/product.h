// The matrix product of attention and of the heads over a vocabulary: C[m][n] = start + sum over k of A(m, k) * B[k][n].
//
// The elements of A are broadcast from memory; its strides between rows and between steps of k, and its alignment, are
// arbitrary. B is packed: its columns, the lanes of a vector, stand in panels [k][kPanel]. C is held in registers while k runs.
// Every element of C is one sequential chain of fused multiply-adds over k, so that no result depends on how the product was
// tiled. A policy says what an element is:
//   Real<float>, Real<double>  one number
//   Pairs  two bfloat16 that are neighbours along k, as one 32-bit element, with float accumulators. Only the AVX512_BF16
//          build has it. Its products flush subnormal numbers to zero.
//   Tiles  Pairs that are multiplied in AMX tiles. Only the AMX build has it (product_amx.h). An element of C is then a chain
//          of sums of 32 products.
// matrix_t<T> is the policy in which this build multiplies tensors of storage type T. Where the build has no products of
// bfloat16 or float16, packing converts the operands to float.
#pragma once
#include "../simd/vec.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

template <typename T> struct Real {
  using Element = T;
  using Acc = T;
  static constexpr int step = 1;   // how many indices of k one element holds
  static constexpr int depth = 1;  // operands hold a multiple of this many indices of k, padded with zeros
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

// Elements that are already in a register, as the bits of a vector.
template <typename P> VEC_INLINE typename P::Lanes lanes_of(Vec<typename P::Acc> bits) {
  if constexpr (P::step == 1) return {bits};
  else return {_mm512_castps_si512(bits.v)};
}

// The register tile, the part of C that is computed at a time: kTileRows rows of kTileVectors vectors, as accumulators.
constexpr int kTileRows = 6;
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
template <typename P> constexpr int64_t kPanel = kTileVectors * Vec<typename P::Acc>::size;

// How the sum over k (one chain) is combined with what C holds.
enum class Start {
  zero,             // C = chain
  scaled,           // C = chain that starts at factor[n] * C
  separate,         // C = C + chain: a separate accumulator for the chain
  separate_scaled   // C = factor[n] * C + chain (not with AMX tiles)
};

// The arguments of a product, which computes lanes [from, to) of C = A B. Strides of A are in bytes, all others in elements.
template <typename P> struct ProductArgs {
  const void* a;
  int64_t a_row_bytes, a_step_bytes;
  const typename P::Element* b;  // panels [k][b_stride], each b_panel elements after the one before
  int64_t b_stride, b_panel;
  typename P::Acc* c;  // [m][c_stride]
  int64_t c_stride;
  int64_t m;         // the number of rows of A and C
  int64_t k;         // the number of elements along k: numbers, or pairs of bfloat16
  int64_t from, to;  // multiples of a vector's lanes
  const typename P::Acc* factor = nullptr;  // [to], with Start::scaled and Start::separate_scaled
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)

#if defined(CPU_CAPABILITY_AMX)
#include "product_amx.h"
#endif

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

#if !defined(CPU_CAPABILITY_AMX)
// The AMX build needs both calls around the products of a thread (product_amx.h). The other builds have nothing to do.
VEC_INLINE void begin_tiles() {}
VEC_INLINE void end_tiles() {}
#endif

template <typename P, Start start, int kRows, int kVectors>
__attribute__((noinline)) void product_tile(const ProductArgs<P>& p, const char* a, const typename P::Element* b,
                                            typename P::Acc* c, const typename P::Acc* factor) {
  using V = Vec<typename P::Acc>;
  V acc[kRows][kVectors];
  if constexpr (start == Start::scaled) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const V scale = V::load(factor + j * V::size);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) acc[i][j] = V::load(c + i * p.c_stride + j * V::size) * scale;
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
      if constexpr (start == Start::separate) acc[i][j] = V::load(out) + acc[i][j];
      if constexpr (start == Start::separate_scaled) acc[i][j] = fma(V::load(factor + j * V::size), V::load(out), acc[i][j]);
      acc[i][j].store(out);
    }
  }
}

template <typename P, Start start> void product(const ProductArgs<P>& p) {
#if defined(CPU_CAPABILITY_AMX)
  if constexpr (kTiles<P>) return product_amx<P, start>(p);
#endif
  constexpr int64_t panel = kPanel<P>;
  const int64_t tiles = (p.m + kTileRows - 1) / kTileRows;  // of nearly equal height: none has only one or two rows
  for (int64_t first = p.from / panel * panel; first < p.to; first += panel) {
    const int64_t j = first > p.from ? first : p.from, end = first + panel < p.to ? first + panel : p.to;
    const auto* b = p.b + first / panel * p.b_panel + (j - first);
    const auto* factor = p.factor + j;
    for (int64_t t = 0, i = 0; t < tiles; ++t) {
      const int64_t rows = p.m / tiles + (t < p.m % tiles);
      const char* a = static_cast<const char*>(p.a) + i * p.a_row_bytes;
      auto* c = p.c + i * p.c_stride + j;
      switch (rows * 8 + (end - j) / Vec<typename P::Acc>::size) {
#define TILE(rows, vectors) \
  case rows * 8 + vectors: product_tile<P, start, rows, vectors>(p, a, b, c, factor); break;
#define TILES(vectors) \
  TILE(1, vectors) TILE(2, vectors) TILE(3, vectors) TILE(4, vectors) TILE(5, vectors) TILE(6, vectors)
        TILES(1)
        TILES(2)
#if defined(CPU_CAPABILITY_AVX512)
        TILES(3)
        TILES(4)
#endif
#undef TILES
#undef TILE
      }
      i += rows;
    }
  }
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
