// SIMD vectors of an accumulator type, compiled once for AVX2 and once for AVX-512; CPU_CAPABILITY says which.
//
// at::vec is not used because its exp and similar functions call Sleef symbols, which no ABI promises, and because it needs
// more instructions to round to bfloat16. Everything is in an unnamed namespace inside the namespace of the instruction set: a
// weak symbol that two builds share would let the linker run AVX-512 code on a machine without AVX-512.
//
// Vec<float> and Vec<double> hold `size` lanes. load and store convert from and to the storage types float, bf16, f16 and
// double. load(p, n) and store(p, n) access only the first n elements; load sets the other lanes to 0. Two<V> is a pair of
// vectors: loops over rows (`for_vectors`) take as many pairs as fit, and then a vector and a partial vector for the rest.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../types.h"

#define VEC_INLINE inline __attribute__((always_inline))
#define VEC_LAMBDA __attribute__((always_inline))

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

template <typename Acc> struct Vec;

// The type of the last argument of load and store says how many elements they move:
//   int      so many lanes of one vector
//   All      one whole vector
//   Both<L>  two vectors. Their lanes are in the order in which tensors of storage type L are loaded fastest: for bf16 the even
//            elements in the first vector and the odd ones in the second, otherwise the order of memory. Arrays of another type
//            that are loaded with Both<L> are brought into the order of L.
struct All {};
template <typename L> struct Both {};
struct Single {};  // in place of the storage type L in for_vectors: the loop takes one vector at a time, not pairs

// The accumulator of a storage type: float for the 16- and 32-bit types, double for double.
template <typename T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <typename T> using acc_t = typename AccOf<T>::type;
template <typename T> constexpr bool is_bf16 = false;
template <> constexpr bool is_bf16<bf16> = true;

VEC_INLINE float to_acc(float v) { return v; }
VEC_INLINE double to_acc(double v) { return v; }
VEC_INLINE float to_acc(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
VEC_INLINE float to_acc(f16 v) { return _cvtsh_ss(v.bits); }

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)

#if defined(CPU_CAPABILITY_AVX512)
#define MM(name) _mm512_##name
#include "vec_avx512.h"
#else
#define MM(name) _mm256_##name
#include "vec_avx2.h"
#endif

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

// ------------------------------------------------------------------------------------------------------ arithmetic
#define VEC_BINARY(function, instruction)                                                                     \
  VEC_INLINE Vec<float> function(Vec<float> a, Vec<float> b) { return MM(instruction##_ps)(a.v, b.v); }       \
  VEC_INLINE Vec<double> function(Vec<double> a, Vec<double> b) { return MM(instruction##_pd)(a.v, b.v); }
#define VEC_TERNARY(function, instruction)                                                                                     \
  VEC_INLINE Vec<float> function(Vec<float> a, Vec<float> b, Vec<float> c) { return MM(instruction##_ps)(a.v, b.v, c.v); }     \
  VEC_INLINE Vec<double> function(Vec<double> a, Vec<double> b, Vec<double> c) { return MM(instruction##_pd)(a.v, b.v, c.v); }
VEC_BINARY(operator+, add)
VEC_BINARY(operator-, sub)
VEC_BINARY(operator*, mul)
VEC_BINARY(operator/, div)
VEC_BINARY(max, max)
VEC_BINARY(min, min)
VEC_TERNARY(fma, fmadd)
VEC_TERNARY(fnma, fnmadd)  // c - a * b
#undef VEC_BINARY
#undef VEC_TERNARY

template <> VEC_INLINE Vec<float> Vec<float>::rounded_to<float>() const { return *this; }
template <> VEC_INLINE Vec<float> Vec<float>::rounded_to<bf16>() const { return widen(to_bf16()); }
template <> VEC_INLINE Vec<float> Vec<float>::rounded_to<f16>() const { return MM(cvtph_ps)(to_f16()); }

// The largest lane of a result of max_abs: no lane is negative, and NaN counts as the largest.
VEC_INLINE float largest_abs(Vec<float> most) {
  int32_t lanes[Vec<float>::size], top = 0;
  most.store(reinterpret_cast<float*>(lanes));
  for (int32_t lane : lanes) top = lane > top ? lane : top;
  float out;
  std::memcpy(&out, &top, 4);
  return out;
}

// ---------------------------------------------------------------------------------------------------- two vectors
template <typename V> struct Two { V a, b; };

#define TWO_OPERATOR(op)                                                                                       \
  template <typename V> VEC_INLINE Two<V> operator op(Two<V> x, Two<V> y) { return {x.a op y.a, x.b op y.b}; } \
  template <typename V> VEC_INLINE Two<V> operator op(V x, Two<V> y) { return {x op y.a, x op y.b}; }          \
  template <typename V> VEC_INLINE Two<V> operator op(Two<V> x, V y) { return {x.a op y, x.b op y}; }
TWO_OPERATOR(+)
TWO_OPERATOR(-)
TWO_OPERATOR(*)
TWO_OPERATOR(/)
#undef TWO_OPERATOR
template <typename V> VEC_INLINE Two<V> fma(Two<V> x, Two<V> y, Two<V> z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
template <typename V> VEC_INLINE Two<V> fma(Two<V> x, Two<V> y, V z) { return {fma(x.a, y.a, z), fma(x.b, y.b, z)}; }
template <typename V> VEC_INLINE Two<V> fma(Two<V> x, V y, Two<V> z) { return {fma(x.a, y, z.a), fma(x.b, y, z.b)}; }
template <typename V> VEC_INLINE Two<V> fnma(Two<V> x, V y, Two<V> z) { return {fnma(x.a, y, z.a), fnma(x.b, y, z.b)}; }
template <typename V> VEC_INLINE Two<V> min(V x, Two<V> y) { return {min(x, y.a), min(x, y.b)}; }

// Adds x * y to a sum over a row that is held in two vectors: for a pair of vectors, and for a single one after the last pair.
template <typename V> VEC_INLINE void add_to(Two<V>& sum, Two<V> x, Two<V> y) { sum = fma(x, y, sum); }
template <typename V> VEC_INLINE void add_to(Two<V>& sum, V x, V y) { sum.a = fma(x, y, sum.a); }

// x after rounding to storage type T, as a store as T and a load would return it.
template <typename T, typename V> VEC_INLINE V rounded_to(V x) { return x.template rounded_to<T>(); }
template <typename T, typename V> VEC_INLINE Two<V> rounded_to(Two<V> x) {
  if constexpr (is_bf16<T>) return {round_upper(x.a), round_upper(x.b)};
  return {x.a.template rounded_to<T>(), x.b.template rounded_to<T>()};
}

// ------------------------------------------------------------------------------------------------ loads and stores
template <typename V, typename T> VEC_INLINE V load(const T* p, All) { return V::load(p); }
template <typename V, typename T> VEC_INLINE V load(const T* p, int n) { return V::load(p, n); }
template <typename V, typename T, typename L> VEC_INLINE Two<V> load(const T* p, Both<L>) {
  Two<V> x;
  if constexpr (is_bf16<L> && is_bf16<T>) {
    load_split(p, x.a, x.b);
  } else {
    x = {V::load(p), V::load(p + V::size)};
    if constexpr (is_bf16<L>) deinterleave(x.a, x.b);
  }
  return x;
}
template <typename T, typename V> VEC_INLINE void store(T* p, V x, All) { x.store(p); }
template <typename T, typename V> VEC_INLINE void store(T* p, V x, int n) { x.store(p, n); }
template <typename T, typename V, typename L> VEC_INLINE void store(T* p, Two<V> x, Both<L>) {
  if constexpr (is_bf16<L> && is_bf16<T>) {
    store_split(p, x.a, x.b);
  } else {
    if constexpr (is_bf16<L>) interleave(x.a, x.b);
    x.a.store(p);
    x.b.store(p + V::size);
  }
}
// Store for values that rounded_to<T> has already rounded: no rounding is needed.
template <typename T, typename V, typename N> VEC_INLINE void store_exact(T* p, V x, N n) { store(p, x, n); }
template <typename V, typename L> VEC_INLINE void store_exact(bf16* p, Two<V> x, Both<L>) { store_split_exact(p, x.a, x.b); }

// Loads and stores of scratch memory, in which the lanes of a pair stay in the order of Both<L>, whatever that is.
template <typename V, typename Acc, typename N> VEC_INLINE V load_partial(const Acc* p, N n) { return load<V>(p, n); }
template <typename V, typename Acc, typename L> VEC_INLINE Two<V> load_partial(const Acc* p, Both<L>) {
  return {V::load(p), V::load(p + V::size)};
}
template <typename V, typename Acc, typename N> VEC_INLINE void store_partial(Acc* p, V x, N n) { store(p, x, n); }
template <typename V, typename Acc, typename L> VEC_INLINE void store_partial(Acc* p, Two<V> x, Both<L>) {
  x.a.store(p);
  x.b.store(p + V::size);
}

// Prefetches the cache lines that load(p, n) would read into the second-level cache.
template <typename V, typename T, typename L> VEC_INLINE void prefetch(const T* p, Both<L>) {
  for (int i = 0; i < 2 * V::size * static_cast<int>(sizeof(T)); i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(p) + i, _MM_HINT_T1);
  }
}
template <typename V, typename T, typename N> VEC_INLINE void prefetch(const T*, N) {}

// Calls body(i, n, u) for the vectors of [0, cols): kUnroll pairs at a time, with u = 0 to kUnroll - 1 (for independent sums),
// then single pairs, then a whole vector, then a partial one. n is Both<L>{}, All{} or an int, as load and store take it. The
// types differ so that a whole vector never takes a masked access, because Zen 4 runs masked 16-bit stores as microcode.
template <int kUnroll, typename V, typename L, typename F> VEC_INLINE void for_unrolled(int64_t cols, const F& body) {
  constexpr int64_t pair = 2 * V::size;
  int64_t i = 0;
  if constexpr (kUnroll > 1) {
    for (; i + kUnroll * pair <= cols; i += kUnroll * pair) {
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) body(i + u * pair, Both<L>{}, u);
    }
  }
  if constexpr (!std::is_same_v<L, Single>) {
    for (; i + pair <= cols; i += pair) body(i, Both<L>{}, 0);
  }
  for (; i + V::size <= cols; i += V::size) body(i, All{}, 0);
  if (i < cols) body(i, static_cast<int>(cols - i), 0);
}
template <typename V, typename L, typename F> VEC_INLINE void for_vectors(int64_t cols, const F& body) {
  for_unrolled<1, V, L>(cols, [&](int64_t i, auto n, int) VEC_LAMBDA { body(i, n); });
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
