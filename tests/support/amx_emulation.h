// The AMX tile instructions that csrc/cpu/gemm/product_amx.h uses, in plain C++, for processors without AMX. Each does what its
// description in Intel's Software Developer's Manual, volume 2, says.
#pragma once
#include <cstdlib>

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

struct Emulated {
  TileConfig config{};
  uint32_t tile[8][kTile][kTile] = {};
  // Aborts where no tiles are configured: the hardware raises an invalid-opcode exception (#UD) there.
  int rows(int t) const { return config.palette == 1 ? config.rows[t] : (std::abort(), 0); }
  int columns(int t) const { return config.row_bytes[t] / 4; }
};
thread_local Emulated emulated;

inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
inline float bf16_half(uint32_t pair, int half) {
  const uint32_t bits = half == 0 ? pair << 16 : pair & 0xffff0000u;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return flushed(x);
}

inline void tile_configure(const TileConfig& config) {
  if (config.palette != 1) std::abort();
  for (int t = 0; t < 16; ++t) {
    const bool used = config.rows[t] != 0 || config.row_bytes[t] != 0;
    if (config.rows[t] > kTile || config.row_bytes[t] > 4 * kTile || (used && t >= 8)) std::abort();
    if (used && (config.rows[t] == 0 || config.row_bytes[t] == 0)) std::abort();
  }
  emulated = Emulated{};
  emulated.config = config;
}
inline void tile_release() { emulated = Emulated{}; }
template <int t> void tile_zero() {
  emulated.rows(t);
  std::memset(emulated.tile[t], 0, sizeof(emulated.tile[t]));
}
template <int t> void tile_load(const void* p, int64_t row_bytes) {
  std::memset(emulated.tile[t], 0, sizeof(emulated.tile[t]));
  for (int i = 0; i < emulated.rows(t); ++i) {
    std::memcpy(emulated.tile[t][i], static_cast<const char*>(p) + i * row_bytes, 4 * emulated.columns(t));
  }
}
template <int t> void tile_store(void* p, int64_t row_bytes) {
  for (int i = 0; i < emulated.rows(t); ++i) {
    std::memcpy(static_cast<char*>(p) + i * row_bytes, emulated.tile[t][i], 4 * emulated.columns(t));
  }
}
// TDPBF16PS: the products at even and at odd positions are summed separately, the two sums are added to each other, and the
// result is added to c. Subnormal numbers count as 0 at every step.
template <int c, int a, int b> void tile_multiply() {
  const int rows = emulated.rows(c), columns = emulated.columns(c), steps = emulated.columns(a);
  if (emulated.rows(a) != rows || emulated.rows(b) != steps || emulated.columns(b) != columns) std::abort();
  for (int i = 0; i < rows; ++i) {
    float sum[2][kTile] = {};
    for (int k = 0; k < steps; ++k) {
      for (int half = 0; half < 2; ++half) {
        const float x = bf16_half(emulated.tile[a][i][k], half);
        for (int j = 0; j < columns; ++j) {
          sum[half][j] = flushed(__builtin_fmaf(x, bf16_half(emulated.tile[b][k][j], half), sum[half][j]));
        }
      }
    }
    for (int j = 0; j < columns; ++j) {
      float old;
      std::memcpy(&old, &emulated.tile[c][i][j], sizeof(old));
      const float total = flushed(flushed(old) + flushed(sum[0][j] + sum[1][j]));
      std::memcpy(&emulated.tile[c][i][j], &total, sizeof(total));
    }
  }
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
