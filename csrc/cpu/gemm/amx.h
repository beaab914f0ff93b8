// The tile instructions of AMX that product_amx.h needs: eight tiles of 16 rows of 64 bytes each, always whole.
//
// They are written as assembly because gcc 12's own functions do not say that a tile instruction reads or writes memory, so
// that the compiler may move a store past it. INTERNLM2_EMULATE_AMX names a header that defines them in plain C++ instead
// (tests/support/amx_emulation.h).
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

// Called before a thread's first product and after its last. Releasing the tiles spares the system saving them at every switch
// of threads. It is no destructor's work, because a destructor brings in a symbol that all builds would share.
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

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
