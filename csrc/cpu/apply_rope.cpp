#include "../apply_rope.h"

#include "rope.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

// Columns [first, first + n) of every head of a token (of every half of a head, unless pairs are interleaved).
template <bool kInterleaved, typename T>
void rotate_heads(const Heads& in, void* out, int64_t token, const Staged<acc_t<T>>& angles, int64_t half, int64_t first,
                  int64_t n) {
  const T* x = static_cast<const T*>(in.data) + token * in.token_stride + first;
  T* y = static_cast<T*>(out) + token * in.heads * 2 * half + first;
  for (int64_t head = 0; head < in.heads; ++head, x += in.head_stride, y += 2 * half) {
    if constexpr (kInterleaved) {
      rotate_pairs<T>(x, y, angles, n);
    } else {
      rotate_halves<T>(x, y, angles, half, n);
    }
  }
}

template <bool kInterleaved, typename T, typename C>
void tokens(const ApplyRope& a, int64_t begin, int64_t end) {
  const int64_t half = a.angles.half, cols = kInterleaved ? 2 * half : half;
  Staged<acc_t<T>> angles;
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t first = 0; first < cols; first += kTile) {
      const int64_t n = cols - first < kTile ? cols - first : kTile;
      if constexpr (kInterleaved) {
        stage_pairs<T, C>(angles, a.angles, token, first, n, a.inverse);
      } else {
        stage<T, C>(angles, a.angles, token, first, n, a.inverse);
      }
      rotate_heads<kInterleaved, T>(a.q, a.q_out, token, angles, half, first, n);
      rotate_heads<kInterleaved, T>(a.k, a.k_out, token, angles, half, first, n);
    }
  }
}

template <typename T, typename C> void typed(const ApplyRope& a, int64_t begin, int64_t end) {
  return a.interleaved ? tokens<true, T, C>(a, begin, end) : tokens<false, T, C>(a, begin, end);
}

}  // namespace

void apply_rope(const ApplyRope& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, {
    if (a.angles.dtype == Dtype::f32) return typed<T, float>(a, begin, end);
    if constexpr (sizeof(T) == 8) return typed<T, double>(a, begin, end);
  })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
