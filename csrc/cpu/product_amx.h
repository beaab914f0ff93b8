// product.h's product in AMX tiles: bfloat16 pairs, float sums. A is read 16 rows by 16 pairs, contiguous along k (its step is
// one element), B 16 rows of 16 lanes, which is the layout that the instruction asks for. k is a multiple of 16 pairs and A
// has a multiple of 16 rows that may be read: operands are packed so, with zeros along k (Tiles::depth). A row beyond m is
// a row of C that nobody keeps.
//
// An element of C is a chain over k in steps of 16 pairs, each the sum of its even and of its odd products, whatever tile it
// stands in: no result depends on m, n or the other rows and lanes.
#pragma once
#include "amx.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

// One tile of C, of which `rows` rows are kept.
template <int t> VEC_INLINE void load_sums(const float* c, int64_t stride, int64_t rows) {
  if (rows >= kTile) return tile_load<t>(c, stride * 4);
  alignas(64) float whole[kTile * kTile] = {};
  for (int64_t i = 0; i < rows; ++i) Vec<float>::load(c + i * stride).store(whole + i * kTile);
  tile_load<t>(whole, kTile * 4);
}
template <int t> VEC_INLINE void store_sums(float* c, int64_t stride, int64_t rows) {
  if (rows >= kTile) return tile_store<t>(c, stride * 4);
  alignas(64) float whole[kTile * kTile];
  tile_store<t>(whole, kTile * 4);
  for (int64_t i = 0; i < rows; ++i) Vec<float>::load(whole + i * kTile).store(c + i * stride);
}

// body(tile of C, its first row and lane within the block) for each of kRows x kColumns tiles.
template <int kRows, int kColumns, typename F> VEC_INLINE void for_tiles(const F& body) {
  body(std::integral_constant<int, 0>{}, 0, 0);
  if constexpr (kColumns > 1) body(std::integral_constant<int, 1>{}, 0, kTile);
  if constexpr (kRows > 1) body(std::integral_constant<int, 2>{}, kTile, 0);
  if constexpr (kRows > 1 && kColumns > 1) body(std::integral_constant<int, 3>{}, kTile, kTile);
}

// Rows from i on, lanes from j on: C in tiles 0 to 3, A in 4 and 5, B in 6 and 7.
template <typename P, bool kFresh, int kRows, int kColumns>
__attribute__((noinline)) void product_tiles(const ProductArgs<P>& p, int64_t i, int64_t j) {
  float* c = p.c + i * p.c_stride + j;
  for_tiles<kRows, kColumns>([&](auto t, int64_t row, int64_t lane) VEC_LAMBDA {
    if constexpr (kFresh) tile_zero<t()>();
    else load_sums<t()>(c + row * p.c_stride + lane, p.c_stride, p.m - i - row);
  });
  const char* a = static_cast<const char*>(p.a) + i * p.a_row_bytes;
  const auto* b = p.b + j;
  for (int64_t k = 0; k < p.k; k += kTile) {
    tile_load<4>(a, p.a_row_bytes);
    tile_load<6>(b, p.b_stride * 4);
    tile_multiply<0, 4, 6>();
    if constexpr (kColumns > 1) {
      tile_load<7>(b + kTile, p.b_stride * 4);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (kRows > 1) {
      tile_load<5>(a + kTile * p.a_row_bytes, p.a_row_bytes);
      tile_multiply<2, 5, 6>();
      if constexpr (kColumns > 1) tile_multiply<3, 5, 7>();
    }
    a += kTile * 4;
    b += kTile * p.b_stride;
  }
  for_tiles<kRows, kColumns>([&](auto t, int64_t row, int64_t lane) VEC_LAMBDA {
    store_sums<t()>(c + row * p.c_stride + lane, p.c_stride, p.m - i - row);
  });
}

template <typename P, Start start> void product_amx(const ProductArgs<P>& p) {
  constexpr bool fresh = start == Start::zero;  // `sum` and `apart` are one here: C is added to at the end of a step
  using V = Vec<float>;
  if constexpr (start == Start::scaled) {
    for (int64_t i = 0; i < p.m; ++i) {
      float* c = p.c + i * p.c_stride;
      for (int64_t j = 0; j < p.n; j += V::size) (V::load(c + j) * V::load(p.factor + j)).store(c + j);
    }
  }
  for (int64_t j = 0; j < p.n; j += 2 * kTile) {
    const bool wide = p.n - j > kTile;
    for (int64_t i = 0; i < p.m; i += 2 * kTile) {
      const bool tall = p.m - i > kTile;
      if (tall && wide) product_tiles<P, fresh, 2, 2>(p, i, j);
      else if (tall) product_tiles<P, fresh, 2, 1>(p, i, j);
      else if (wide) product_tiles<P, fresh, 1, 2>(p, i, j);
      else product_tiles<P, fresh, 1, 1>(p, i, j);
    }
  }
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
