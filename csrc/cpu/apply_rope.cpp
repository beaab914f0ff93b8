#include "../apply_rope.h"

#include "rope.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

template <bool kInterleaved, bool kInverse, typename T, typename C>
void rotate_heads(const Heads& in, void* out, int64_t token, const C* cos, const C* sin, int64_t half) {
  const T* x = static_cast<const T*>(in.data) + token * in.token_stride;
  T* y = static_cast<T*>(out) + token * in.heads * 2 * half;
  for (int64_t head = 0; head < in.heads; ++head, x += in.head_stride, y += 2 * half) {
    if constexpr (kInterleaved) {
      rotate_pairs<kInverse>(x, y, cos, sin, half);
    } else {
      rotate_halves<kInverse>(x, y, cos, sin, half);
    }
  }
}

template <bool kInterleaved, bool kInverse, typename T, typename C>
void tokens(const ApplyRope& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t row = table_offset(a.angles, token);
    const C *cos = static_cast<const C*>(a.angles.cos) + row, *sin = static_cast<const C*>(a.angles.sin) + row;
    rotate_heads<kInterleaved, kInverse, T>(a.q, a.q_out, token, cos, sin, a.angles.half);
    rotate_heads<kInterleaved, kInverse, T>(a.k, a.k_out, token, cos, sin, a.angles.half);
  }
}

template <typename T, typename C> void typed(const ApplyRope& a, int64_t begin, int64_t end) {
  if (a.interleaved) return a.inverse ? tokens<true, true, T, C>(a, begin, end) : tokens<true, false, T, C>(a, begin, end);
  return a.inverse ? tokens<false, true, T, C>(a, begin, end) : tokens<false, false, T, C>(a, begin, end);
}

}  // namespace

void apply_rope(const ApplyRope& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, {
    if (a.angles.dtype == Dtype::f32) return typed<T, float>(a, begin, end);
    if constexpr (sizeof(T) == 8) return typed<T, double>(a, begin, end);
  })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
