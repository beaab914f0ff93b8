// Rotation of one head by one token's angles. Products and sums are rounded one by one, as PyTorch's own composition
// rounds them: all processors give the same bits, and a cache written by one is the cache that another would write.
#pragma once
#include "../rope_table.h"
#include "dispatch.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

VEC_INLINE int64_t index_at(const void* values, Dtype dtype, int64_t i) {
  return dtype == Dtype::i32 ? static_cast<const int32_t*>(values)[i] : static_cast<const int64_t*>(values)[i];
}

// Where the angles of a token begin in both tables.
VEC_INLINE int64_t table_offset(const RopeAngles& a, int64_t token) {
  return (a.positions ? index_at(a.positions, a.positions_dtype, token) : token) * a.half;
}

// (a, b) -> (a cos - b sin, b cos + a sin), or with -sin, for a = x[i], b = x[i + half].
template <bool kInverse, typename T, typename C>
VEC_INLINE void rotate_halves(const T* x, T* y, const C* cos, const C* sin, int64_t half) {
  using V = Vec<acc_t<T>>;
  for_vectors<V>(half, [&](int64_t i, auto n) {
    const V a = load<V>(x + i, n), b = load<V>(x + half + i, n), c = load<V>(cos + i, n), s = load<V>(sin + i, n);
    if constexpr (kInverse) {
      store(y + i, a * c + b * s, n);
      store(y + half + i, b * c - a * s, n);
    } else {
      store(y + i, a * c - b * s, n);
      store(y + half + i, b * c + a * s, n);
    }
  });
}

// The same for pairs x[2i], x[2i + 1], in place: x * cos + (x with its pairs swapped) * sin, one lane of a pair negated.
template <bool kInverse, typename T, typename C>
VEC_INLINE void rotate_pairs(const T* x, T* y, const C* cos, const C* sin, int64_t half) {
  using V = Vec<acc_t<T>>;
  const auto turn = [&](int64_t i, auto n, int pairs) {
    V c, s;
    load_doubled(c, cos + i / 2, pairs);
    load_doubled(s, sin + i / 2, pairs);
    const V v = load<V>(x + i, n);
    store(y + i, v * c + negate_lanes<kInverse>(swap_pairs(v) * s), n);
  };
  int64_t i = 0;
  for (; i + V::size <= 2 * half; i += V::size) turn(i, All{}, V::size / 2);
  if (i < 2 * half) turn(i, static_cast<int>(2 * half - i), static_cast<int>(half - i / 2));
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
