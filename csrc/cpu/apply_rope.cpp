#include "../apply_rope.h"

#include "rope.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

// Rotates some columns of every head of a token. With kInterleaved they are columns [first, first + n) of the head; otherwise
// they are columns [first, first + n) of each half of the head.
template <bool kInterleaved, typename T>
void rotate_heads(const Heads& in, void* out, int64_t token, const Staged<acc_t<T>>& angles, int64_t half, int64_t first,
                  int64_t n) {
  const T* x = static_cast<const T*>(in.data) + token * in.token_stride + first;
  T* y = static_cast<T*>(out) + token * in.heads * 2 * half + first;
  for (int64_t head = 0; head < in.heads; ++head, x += in.head_stride, y += 2 * half) {
    if constexpr (kInterleaved) rotate_pairs<T>(x, y, angles, n);
    else rotate_halves<T>(x, y, angles, half, n);
  }
}

template <bool kInterleaved, typename T> void tokens(const ApplyRope& a, int64_t begin, int64_t end) {
  const auto rotate = [&](int64_t token, const Staged<acc_t<T>>& angles, int64_t first, int64_t n) {
    rotate_heads<kInterleaved, T>(a.q, a.q_out, token, angles, a.angles.half, first, n);
    rotate_heads<kInterleaved, T>(a.k, a.k_out, token, angles, a.angles.half, first, n);
  };
  for_tokens<T, kInterleaved>(a.angles, begin, end, a.inverse, rotate);
}

}  // namespace

void apply_rope(const ApplyRope& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, { a.interleaved ? tokens<true, T>(a, begin, end) : tokens<false, T>(a, begin, end); })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
