// Rotation of heads by the angles of their token. Each product and sum is rounded on its own, as in PyTorch's eager composition
// (no fused multiply-add). So all devices give the same bits, and it does not matter which of them wrote a cache.
#pragma once
#include "../rope_angles.h"
#include "dispatch.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

VEC_INLINE int64_t index_at(const void* values, Dtype dtype, int64_t i) {
  return dtype == Dtype::i32 ? static_cast<const int32_t*>(values)[i] : static_cast<const int64_t*>(values)[i];
}

// Where the angles of a token begin in the tables of cos and sin.
VEC_INLINE int64_t table_row(const RopeAngles& a, int64_t token) {
  return (a.positions ? index_at(a.positions, a.positions_dtype, token) : token) * a.half;
}

constexpr int64_t kTile = 256;  // columns whose angles are staged together

// cos and sin of up to kTile columns of one token, converted and put in the order of the lanes once for all heads.
template <typename Acc> struct Staged {
  alignas(64) Acc cos[kTile], sin[kTile];
};

// Stages columns [first, first + n) of the table row of a token, with sin negated for the inverse rotation.
template <typename T, typename C>
VEC_INLINE void stage(Staged<acc_t<T>>& out, const RopeAngles& a, int64_t token, int64_t first, int64_t n, bool inverse) {
  using V = Vec<acc_t<T>>;
  const int64_t row = table_row(a, token) + first;
  const C *cos = static_cast<const C*>(a.cos) + row, *sin = static_cast<const C*>(a.sin) + row;
  const V sign(inverse ? -1 : 1);
  for_vectors<V, T>(n, [&](int64_t i, auto w) VEC_LAMBDA {
    store_partial(out.cos + i, load<V>(cos + i, w), w);
    store_partial(out.sin + i, load<V>(sin + i, w) * sign, w);
  });
}

// (a, b) -> (a cos - b sin, b cos + a sin) for a = x[i], b = x[i + half], i in [0, n).
template <typename T>
VEC_INLINE void rotate_halves(const T* x, T* y, const Staged<acc_t<T>>& angles, int64_t half, int64_t n) {
  using V = Vec<acc_t<T>>;
  for_vectors<V, T>(n, [&](int64_t i, auto w) VEC_LAMBDA {
    const auto a = load<V>(x + i, w), b = load<V>(x + half + i, w);
    const auto c = load_partial<V>(angles.cos + i, w), s = load_partial<V>(angles.sin + i, w);
    store(y + i, a * c - b * s, w);
    store(y + half + i, b * c + a * s, w);
  });
}

// Stages the angles for interleaved pairs a = x[2i], b = x[2i + 1]: cos for both columns, -sin for a's column and sin for b's.
// Columns [first, first + n) are those of the head, [0, 2 * half); first and n are even.
template <typename T, typename C>
VEC_INLINE void stage_pairs(Staged<acc_t<T>>& out, const RopeAngles& a, int64_t token, int64_t first, int64_t n,
                            bool inverse) {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  const int64_t row = table_row(a, token) + first / 2;
  const C *cos = static_cast<const C*>(a.cos) + row, *sin = static_cast<const C*>(a.sin) + row;
  Staged<Acc> doubled;
  for (int64_t i = 0; i < n / 2; ++i) {
    doubled.cos[2 * i] = doubled.cos[2 * i + 1] = static_cast<Acc>(cos[i]);
    const Acc s = static_cast<Acc>(inverse ? -sin[i] : sin[i]);
    doubled.sin[2 * i] = -s;
    doubled.sin[2 * i + 1] = s;
  }
  for_vectors<V, T>(n, [&](int64_t i, auto w) VEC_LAMBDA {
    store_partial(out.cos + i, load<V>(doubled.cos + i, w), w);
    store_partial(out.sin + i, load<V>(doubled.sin + i, w), w);
  });
}

template <typename V, typename N> VEC_INLINE V swap_neighbours(V x, N) { return swap_pairs(x); }
template <typename V, typename L> VEC_INLINE Two<V> swap_neighbours(Two<V> x, Both<L>) {
  if constexpr (is_bf16<L>) return {x.b, x.a};
  return {swap_pairs(x.a), swap_pairs(x.b)};
}

template <typename T> VEC_INLINE void rotate_pairs(const T* x, T* y, const Staged<acc_t<T>>& angles, int64_t n) {
  using V = Vec<acc_t<T>>;
  for_vectors<V, T>(n, [&](int64_t i, auto w) VEC_LAMBDA {
    const auto v = load<V>(x + i, w);
    store(y + i, v * load_partial<V>(angles.cos + i, w) + swap_neighbours(v, w) * load_partial<V>(angles.sin + i, w), w);
  });
}

// Calls each(token, angles, first, n) for tokens [begin, end) and every tile of columns [first, first + n), whose angles are
// staged. The columns are those of one half of a head, [0, half), or with kPairs (interleaved pairs) those of the head, [0, 2 *
// half).
template <typename T, bool kPairs, typename F>
VEC_INLINE void for_tokens(const RopeAngles& a, int64_t begin, int64_t end, bool inverse, const F& each) {
  Staged<acc_t<T>> angles;
  const int64_t cols = kPairs ? 2 * a.half : a.half;
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t first = 0; first < cols; first += kTile) {
      const int64_t n = cols - first < kTile ? cols - first : kTile;
      const auto fill = [&](auto table) {
        if constexpr (kPairs) stage_pairs<T, decltype(table)>(angles, a, token, first, n, inverse);
        else stage<T, decltype(table)>(angles, a, token, first, n, inverse);
      };
      if (a.dtype == Dtype::f32) fill(float());
      else if constexpr (sizeof(T) == 8) fill(double());
      each(token, angles, first, n);
    }
  }
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
