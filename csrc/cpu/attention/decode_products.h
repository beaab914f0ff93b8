// The two products of decode.h: scores of a vector's worth of keys, and weighted values. Rows of keys and values are read
// through pointers, because those of a paged cache are not contiguous.
#pragma once
#include "common.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

// The chain of s[r][i] = q[r] . k[i] that begins at step `from`, for a vector's worth of keys and rows r < kRows. The keys are
// `offset` elements beyond the pointers. Meanwhile the keys kAhead further on are prefetched.
template <typename P, int kRows, typename S>
__attribute__((noinline)) void decode_scores(const S* const* keys, int64_t offset, const typename P::Element* q,
                                          int64_t d_steps, int64_t from, typename P::Acc* s) {
  using V = Vec<typename P::Acc>;
  const int64_t steps = lesser(kChain<P> / P::step, d_steps - from);
  q += from;
  offset += from * P::step;
  V acc[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[r] = V(0);
  for_vectors<V, Single>(steps, [&](int64_t e, auto n) VEC_LAMBDA {
    V k[V::size];
#pragma GCC unroll 16
    for (int i = 0; i < V::size; ++i) {
      prefetch_line(keys[kAhead + i] + offset + e * P::step);
      k[i] = Elements<P>::row(keys[i] + offset, e, n);
    }
    transpose(k);
    const auto step = [&](int u) VEC_LAMBDA {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const auto* from = reinterpret_cast<const char*>(q + r * d_steps + e + u);
        acc[r] = P::add_product(acc[r], P::broadcast(from), lanes_of<P>(k[u]));
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
  for (int r = 0; r < kRows; ++r) (from == 0 ? acc[r] : V::load(s + r * kBlock) + acc[r]).store(s + r * kBlock);
}

// Whether two successive vectors of values come out of interleaved_rows with their lanes in its order, which o keeps until it
// is finished.
template <typename P, typename S> constexpr bool kInterleaved = P::step == 2 && is_bf16<S>;

// o[r][e..] = (opens ? 0 : factor[r] * o[r][e..]) + sum of p[r][i] * v[i][e..] over rows of values; kVectors of d at a time.
template <typename P, int kRows, int kVectors, typename S, typename N>
VEC_INLINE void decode_values(const S* const* values, int64_t offset, int64_t n, const typename P::Element* p,
                           const typename P::Acc* factor, bool opens, typename P::Acc* o, int64_t width, int64_t e, N lanes) {
  using V = Vec<typename P::Acc>;
  V acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      acc[r][j] = opens ? V(0) : V::load(o + r * width + e + j * V::size);
      if (factor != nullptr && !opens) acc[r][j] = acc[r][j] * V(factor[r]);
    }
  }
  for (int64_t i = 0; i < n; i += P::step) {
    const S *a = values[i] + offset, *b = i + 1 < n ? values[i + 1] + offset : nullptr;
    V v[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = e + j * V::size;
      if (j * V::size * sizeof(S) % 64 == 0) {
        for (int u = 0; u < P::step; ++u) prefetch_line(values[kAhead + i + u] + offset + at);
      }
      if constexpr (kInterleaved<P, S> && kVectors % 2 == 0) {
        if (j % 2 == 0) Elements<P>::interleaved_rows(a, b, at, v[j], v[j + 1]);
      } else if constexpr (P::step == 2) {
        v[j] = Elements<P>::rows(a, b, at, lanes);
      } else {
        v[j] = Elements<P>::row(a, at, lanes);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto one = P::broadcast(reinterpret_cast<const char*>(p + r * (kBlock / P::step) + i / P::step));
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[r][j] = P::add_product(acc[r][j], one, lanes_of<P>(v[j]));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[r][j].store(o + r * width + e + j * V::size);
  }
}

template <typename P, int kRows, typename S>
__attribute__((noinline)) void decode_values_of(const S* const* values, int64_t offset, int64_t n,
                                             const typename P::Element* p, const typename P::Acc* factor, bool opens,
                                             typename P::Acc* o, int64_t width, int64_t d) {
  constexpr int64_t lanes = Vec<typename P::Acc>::size;
  constexpr int registers = kTileRows * kTileVectors, fit = registers / kRows;
  constexpr int vectors = fit >= 8 && kInterleaved<P, S> ? 8 : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
  int64_t e = 0;
  for (; e + vectors * lanes <= d; e += vectors * lanes) {
    decode_values<P, kRows, vectors>(values, offset, n, p, factor, opens, o, width, e, All{});
  }
  if constexpr (kInterleaved<P, S>) {
    for (; e + 2 * lanes <= d; e += 2 * lanes) {
      decode_values<P, kRows, 2>(values, offset, n, p, factor, opens, o, width, e, All{});
    }
  }
  for (; e + lanes <= d; e += lanes) decode_values<P, kRows, 1>(values, offset, n, p, factor, opens, o, width, e, All{});
  if (e < d) decode_values<P, kRows, 1>(values, offset, n, p, factor, opens, o, width, e, static_cast<int>(d - e));
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
