// SIMD vectors of one accumulator type, compiled once for AVX2 and once for AVX-512 (CPU_CAPABILITY says which).
//
// Why not at::vec: its exp and kin call Sleef symbols that libtorch_cpu exports but no ABI promises, and it rounds to
// bfloat16 in several instructions more. Everything is in an unnamed namespace inside the instruction set's own: a weak
// symbol shared between the two builds would let the linker run AVX-512 code on an AVX2 machine.
//
// Vec<float> and Vec<double> hold `size` lanes. load/store convert from and to the storage types float, bf16, f16 and
// double; load(p, n) and store(p, n) touch only the first n lanes (missing lanes read as 0). Two<V> is a pair of vectors,
// which loops over rows work on: `for_vectors` hands out pairs, then what is left.
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

// How many elements load and store move: so many lanes of a vector (an int), a whole vector, or two of them. The order of
// two vectors' lanes is that which tensors of storage type L load and store cheapest: even and odd elements for bf16,
// else one after the other; arrays of another type that meet them are brought into the same order.
struct All {};
template <typename L> struct Both {};
struct Single {};  // in place of L: a loop that takes one vector at a time

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
#include "vec_avx512.h"
#else
#include "vec_avx2.h"
#endif

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

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

// A running sum over a row takes pairs and what is left after them.
template <typename V> VEC_INLINE void add_to(Two<V>& sum, Two<V> x, Two<V> y) { sum = fma(x, y, sum); }
template <typename V> VEC_INLINE void add_to(Two<V>& sum, V x, V y) { sum.a = fma(x, y, sum.a); }

// What a value becomes when it is stored as T and read again.
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
// The same for values that rounded_to<T> has rounded already.
template <typename T, typename V, typename N> VEC_INLINE void store_exact(T* p, V x, N n) { store(p, x, n); }
template <typename V, typename L> VEC_INLINE void store_exact(bf16* p, Two<V> x, Both<L>) { store_split_exact(p, x.a, x.b); }

// Scratch in whatever order the lanes have.
template <typename V, typename Acc, typename N> VEC_INLINE V load_partial(const Acc* p, N n) { return load<V>(p, n); }
template <typename V, typename Acc, typename L> VEC_INLINE Two<V> load_partial(const Acc* p, Both<L>) {
  return {V::load(p), V::load(p + V::size)};
}
template <typename V, typename Acc, typename N> VEC_INLINE void store_partial(Acc* p, V x, N n) { store(p, x, n); }
template <typename V, typename Acc, typename L> VEC_INLINE void store_partial(Acc* p, Two<V> x, Both<L>) {
  x.a.store(p);
  x.b.store(p + V::size);
}

// Asks for the cache lines of the elements that load(p, n) would read, into the second-level cache.
template <typename V, typename T, typename L> VEC_INLINE void prefetch(const T* p, Both<L>) {
  for (int i = 0; i < 2 * V::size * static_cast<int>(sizeof(T)); i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(p) + i, _MM_HINT_T1);
  }
}
template <typename V, typename T, typename N> VEC_INLINE void prefetch(const T*, N) {}

// Runs body(i, n, u) over [0, cols): pairs of vectors in turns of kUnroll (u: the place in the turn, for independent sums),
// pairs, a whole vector, and one partial vector with n = the lanes left. Their types differ, so that a whole vector never
// takes a masked access: Zen 4 microcodes masked 16-bit stores.
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
