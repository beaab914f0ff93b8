// The register peak: loops of multiply-add instructions that touch no memory.
// registers.py compiles this file at the first benchmark on a machine. It is not part of the installed package.
//
// Every loop keeps enough independent accumulators to hide the latency of the instruction, so that its rate is the
// throughput of the instruction set, which no matrix product can exceed.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int kAccumulators = 16;

// Keeps a value alive without storing it: the compiler must assume that it is read and changed.
#define KEEP(v) asm volatile("" : "+v"(v))

__attribute__((target("avx2,fma"))) void loop_avx2(int64_t count) {
  __m256 sum[12], a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(1e-6f);  // 16 registers in all
  for (auto& s : sum) s = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; i++) {
    KEEP(a);
#pragma GCC unroll 12
    for (auto& s : sum) s = _mm256_fmadd_ps(a, b, s);
  }
  for (auto& s : sum) KEEP(s);
}

__attribute__((target("avx512f"))) void loop_avx512(int64_t count) {
  __m512 sum[kAccumulators], a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(1e-6f);
  for (auto& s : sum) s = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i++) {
    KEEP(a);
#pragma GCC unroll 16
    for (auto& s : sum) s = _mm512_fmadd_ps(a, b, s);
  }
  for (auto& s : sum) KEEP(s);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) void loop_avx512_bf16(int64_t count) {
  __m512 sum[kAccumulators];
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = (__m512bh)_mm512_set1_epi16(0x3580);  // 1 and about 1e-6
  for (auto& s : sum) s = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i++) {
    KEEP(a);
#pragma GCC unroll 16
    for (auto& s : sum) s = _mm512_dpbf16_ps(s, a, b);
  }
  for (auto& s : sum) KEEP(s);
}

// Four accumulator tiles, two tiles of A and two of B: the largest block that the eight tile registers hold.
__attribute__((target("amx-tile,amx-bf16"))) void loop_amx(int64_t count) {
  struct alignas(64) { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config;
  std::memset(&config, 0, sizeof(config));
  config.palette = 1;
  for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
  asm volatile("" : : "r"(&config) : "memory");  // gcc 12 does not see that the next instruction reads all of `config`
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < count; i++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

struct Loop {
  const char* name;
  void (*run)(int64_t);
  double flops;  // floating-point operations of one iteration
};

// A multiply-add is two operations.
constexpr Loop kLoops[] = {{"avx2", loop_avx2, 12 * 8 * 2},
                           {"avx512", loop_avx512, kAccumulators * 16 * 2},
                           {"avx512_bf16", loop_avx512_bf16, kAccumulators * 32 * 2},
                           {"amx", loop_amx, 4 * 16 * 16 * 32 * 2}};

}  // namespace

// Runs the loop of the instruction set `name` for `count` iterations on each of `threads` threads and returns the number of
// floating-point operations done. Returns -1 for an unknown name and where the system does not permit AMX. The caller has made
// sure that the processor has the instruction set.
extern "C" double run(const char* name, int64_t count, int threads) {
  for (const Loop& loop : kLoops) {
    if (std::strcmp(loop.name, name) != 0) continue;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arguments of the system call arch_prctl
    if (loop.run == loop_amx && syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return -1;
    std::vector<std::thread> others;
    for (int t = 1; t < threads; t++) others.emplace_back(loop.run, count);
    loop.run(count);
    for (auto& other : others) other.join();
    return loop.flops * static_cast<double>(count) * threads;
  }
  return -1;
}
