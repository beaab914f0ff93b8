// A thread's scratch memory as an arena, and arithmetic on sizes.
#pragma once
#include "../simd/vec.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

VEC_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
VEC_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
VEC_INLINE int64_t clip(int64_t x, int64_t low, int64_t high) { return greater(low, lesser(x, high)); }
VEC_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Allocates arrays from `memory`, each beginning on a cache line. Without memory (nullptr) it only counts the bytes that they
// need.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename U> VEC_INLINE void take(U*& part, int64_t count) {
    part = memory_ == nullptr ? nullptr : reinterpret_cast<U*>(memory_ + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(U)), 64);
  }
  int64_t bytes = 0;

 private:
  char* memory_;
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
