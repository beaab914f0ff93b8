#include "../qkv_rope.h"

#include "rope.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

template <typename T, typename N> VEC_INLINE Vec<float> load_float(const T* p, N n) { return load<Vec<float>>(p, n); }
VEC_INLINE Vec<float> load_float(const double* p, int n) {
  float lanes[Vec<float>::size] = {};
  for (int i = 0; i < n; ++i) lanes[i] = static_cast<float>(p[i]);
  return Vec<float>::load(lanes);
}
VEC_INLINE Vec<float> load_float(const double* p, All) { return load_float(p, Vec<float>::size); }

// Quantizes one head to int8. The scale is max |x| / 127 in float, and NaN where an x is NaN. What is stored is x / scale,
// rounded half to even; a scale of 0 divides as 1.
template <typename T> void quantize(const T* x, int8_t* out, float* scale, int64_t d) {
  using V = Vec<float>;
  V most;
  for_vectors<V, Single>(d, [&](int64_t i, auto n) VEC_LAMBDA { most = max_abs(most, load_float(x + i, n)); });
  const float size = largest_abs(most) / 127.0f;
  *scale = size;
  const V divisor(size == 0.0f ? 1.0f : size);
  for_vectors<V, Single>(d, [&](int64_t i, auto n) VEC_LAMBDA {
    store_i8(out + i, max(V(-127.0f), load_float(x + i, n) / divisor), n);
  });
}

// Writes a rotated key or a value to its slot of the cache.
template <typename T>
void write_cache(const QkvRopeFwd& a, const T* x, void* cache, float* scale, int64_t slot, int64_t group, int64_t d) {
  const int64_t place = slot * a.groups + group;
  if (a.quantized) return quantize(x, static_cast<int8_t*>(cache) + place * d, scale + place, d);
  std::memcpy(static_cast<T*>(cache) + place * d, x, sizeof(T) * static_cast<size_t>(d));
}

// Rotates columns [first, first + n) of each half of a token's query and key heads. The call that has the last columns also
// copies the token's values and writes the cache.
template <typename T>
void fwd_token(const QkvRopeFwd& a, int64_t token, const Staged<acc_t<T>>& angles, int64_t first, int64_t n) {
  const int64_t half = a.angles.half, d = 2 * half;
  const T* x = static_cast<const T*>(a.qkv) + token * a.token_stride;
  T* q = static_cast<T*>(a.q) + token * a.groups * a.group * d;
  T* k = static_cast<T*>(a.k) + token * a.groups * d;
  T* v = static_cast<T*>(a.v) + token * a.groups * d;
  const int64_t slot = a.slots ? a.slots[token] : -1;
  for (int64_t group = 0; group < a.groups; ++group, k += d, v += d, x += 2 * d) {
    for (int64_t head = 0; head < a.group; ++head, x += d, q += d) {
      rotate_halves<T>(x + first, q + first, angles, half, n);
    }
    rotate_halves<T>(x + first, k + first, angles, half, n);
    if (first + n < half) continue;
    std::memcpy(v, x + d, sizeof(T) * static_cast<size_t>(d));
    if (slot >= 0) {
      write_cache(a, k, a.k_cache, a.k_scale, slot, group, d);
      write_cache(a, v, a.v_cache, a.v_scale, slot, group, d);
    }
  }
}

template <typename T>
void bwd_token(const QkvRopeBwd& a, int64_t token, const Staged<acc_t<T>>& angles, int64_t first, int64_t n) {
  const int64_t half = a.angles.half, d = 2 * half, groups = a.dk.heads, group = a.dq.heads / groups;
  const T* dq = static_cast<const T*>(a.dq.data) + token * a.dq.token_stride;
  const T* dk = static_cast<const T*>(a.dk.data) + token * a.dk.token_stride;
  const T* dv = static_cast<const T*>(a.dv.data) + token * a.dv.token_stride;
  T* dx = static_cast<T*>(a.dqkv) + token * groups * (group + 2) * d;
  for (int64_t i = 0; i < groups; ++i, dk += a.dk.head_stride, dv += a.dv.head_stride, dx += 2 * d) {
    for (int64_t head = 0; head < group; ++head, dq += a.dq.head_stride, dx += d) {
      rotate_halves<T>(dq + first, dx + first, angles, half, n);
    }
    rotate_halves<T>(dk + first, dx + first, angles, half, n);
    if (first + n == half) std::memcpy(dx + d, dv, sizeof(T) * static_cast<size_t>(d));
  }
}

}  // namespace

void qkv_rope_fwd(const QkvRopeFwd& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, {
    for_tokens<T, false>(a.angles, begin, end, false, [&](int64_t token, const Staged<acc_t<T>>& angles, int64_t first,
                                                      int64_t n) {
      fwd_token<T>(a, token, angles, first, n);
    });
  })
}

void qkv_rope_bwd(const QkvRopeBwd& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, {
    for_tokens<T, false>(a.angles, begin, end, true, [&](int64_t token, const Staged<acc_t<T>>& angles, int64_t first,
                                                     int64_t n) {
      bwd_token<T>(a, token, angles, first, n);
    });
  })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
