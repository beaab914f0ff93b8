// The product of product.h in AMX tiles, of bfloat16 pairs with float sums. A tile of A is 16 rows of 16 pairs that are
// contiguous along k (the step of A is one element). A tile of B is 16 pairs along k by 16 lanes, the layout that the
// instruction needs. Operands are packed so that k is a multiple of 16 pairs, padded with zeros (Tiles::depth), and that the
// rows of A up to the next multiple of 16 may be read. The rows of C that belong to those beyond m are not stored.
//
// An element of C is a chain over k in steps of 16 pairs. A step adds two sums to it, that of the products of the first and
// that of the second bfloat16 of each pair. This order is the same in every tile, so that no result depends on m, on the range
// of lanes or on other rows and lanes.
//
// The tile instructions are written as assembly because gcc 12's own functions do not say that a tile instruction reads or
// writes memory, so that the compiler may move a store past it. INTERNLM2_EMULATE_AMX names a header that defines them in plain
// C++ instead (tests/support/amx_emulation.h).
#pragma once
#include "../simd/vec.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr int64_t kTile = 16;  // rows of a tile, and 4-byte elements of a row

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "what LDTILECFG reads");

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)

#if defined(INTERNLM2_EMULATE_AMX)
#include INTERNLM2_EMULATE_AMX
#endif

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

#if !defined(INTERNLM2_EMULATE_AMX)
VEC_INLINE void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
VEC_INLINE void tile_release() { asm volatile("tilerelease"); }
template <int t> VEC_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(t)); }
template <int t> VEC_INLINE void tile_load(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(t) : "memory");
}
template <int t> VEC_INLINE void tile_store(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(t) : "memory");
}
template <int c, int a, int b> VEC_INLINE void tile_multiply() {  // c += a b
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
#endif

// Called before a thread's first product and after its last one. Once the tiles are released, the operating system need not
// save them when it switches threads. A class with a destructor would do this too, but would add a symbol that the linker
// shares among builds.
inline void begin_tiles() {
  TileConfig config{};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 4 * kTile;
    config.rows[t] = kTile;
  }
  tile_configure(config);
}
inline void end_tiles() { tile_release(); }

// Load and store a tile of C of which only `rows` rows exist in memory.
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

// Calls body(tile register, first row, first lane) for each of the kRows x kColumns tiles of C that are computed together.
template <int kRows, int kColumns, typename F> VEC_INLINE void for_each_tile(const F& body) {
  body(std::integral_constant<int, 0>{}, 0, 0);
  if constexpr (kColumns > 1) body(std::integral_constant<int, 1>{}, 0, kTile);
  if constexpr (kRows > 1) body(std::integral_constant<int, 2>{}, kTile, 0);
  if constexpr (kRows > 1 && kColumns > 1) body(std::integral_constant<int, 3>{}, kTile, kTile);
}

// Computes kRows x kColumns tiles of C, from row i and lane j on. C is in tile registers 0 to 3, A in 4 and 5, B in 6 and 7.
template <typename P, bool kFresh, int kRows, int kColumns>
__attribute__((noinline)) void product_tiles(const ProductArgs<P>& p, int64_t i, int64_t j) {
  float* c = p.c + i * p.c_stride + j;
  for_each_tile<kRows, kColumns>([&](auto t, int64_t row, int64_t lane) VEC_LAMBDA {
    if constexpr (kFresh) tile_zero<t()>();
    else load_sums<t()>(c + row * p.c_stride + lane, p.c_stride, p.m - i - row);
  });
  const char* a = static_cast<const char*>(p.a) + i * p.a_row_bytes;
  const auto* b = p.b + j / kPanel<P> * p.b_panel + j % kPanel<P>;
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
  for_each_tile<kRows, kColumns>([&](auto t, int64_t row, int64_t lane) VEC_LAMBDA {
    store_sums<t()>(c + row * p.c_stride + lane, p.c_stride, p.m - i - row);
  });
}

template <typename P, Start start> void product_amx(const ProductArgs<P>& p) {
  constexpr bool fresh = start == Start::zero;  // otherwise the sums start from what C holds
  using V = Vec<float>;
  if constexpr (start == Start::scaled) {
    for (int64_t i = 0; i < p.m; ++i) {
      float* c = p.c + i * p.c_stride;
      for (int64_t j = p.from; j < p.to; j += V::size) (V::load(c + j) * V::load(p.factor + j)).store(c + j);
    }
  }
  for (int64_t j = p.from, end; j < p.to; j = end) {  // two tiles at a time, within one panel of B
    const int64_t panel_end = (j / kPanel<P> + 1) * kPanel<P>, last = panel_end < p.to ? panel_end : p.to;
    const bool wide = last - j > kTile;
    end = j + (wide ? 2 : 1) * kTile;
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
