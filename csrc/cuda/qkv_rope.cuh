// Split of the packed projection, rotation and cache write on CUDA. A block takes one token after another. Thread (x, y) takes
// heads y, y + blockDim.y, ... of the token, and of each of them columns [x * n, x * n + n) of the first half and the same
// columns of the second half. Each product and sum is rounded on its own, as in PyTorch's eager composition (no fused
// multiply-add), so that a cache has the same bits whichever device wrote it.
#pragma once
#include "../qkv_rope.h"
#include "common.cuh"

namespace internlm2 { namespace cuda { namespace {

__device__ __forceinline__ int64_t position_of(const RopeAngles& a, int64_t token) {
  if (a.positions == nullptr) return token;
  return a.positions_dtype == Dtype::i32 ? static_cast<const int*>(a.positions)[token]
                                         : static_cast<const int64_t*>(a.positions)[token];
}

__device__ __forceinline__ bool first_thread() { return threadIdx.x == 0 && threadIdx.y == 0; }

// cos and sin of n columns from `col` on. Where the position is not `inside` the table they are NaN, and the table is not read.
template <int n> struct Angles { float cos[n], sin[n]; };
template <int n>
__device__ __forceinline__ Angles<n> angles_at(const RopeAngles& a, int64_t position, bool inside, int64_t col, bool wide) {
  Angles<n> out;
  const float nan = __int_as_float(0x7fffffff);
  Piece<float, n> cos, sin;
  const int64_t offset = inside ? position * a.half + col : 0;
  const int64_t valid = inside ? a.half - col : 0;
  if (inside) {
    load(cos, static_cast<const float*>(a.cos) + offset, valid, wide);
    load(sin, static_cast<const float*>(a.sin) + offset, valid, wide);
  }
#pragma unroll
  for (int j = 0; j < n; ++j) {
    out.cos[j] = inside ? cos.v[j] : nan;
    out.sin[j] = inside ? sin.v[j] : nan;
  }
  return out;
}

// Rotates a and b in place: (a, b) -> (a cos - b sin, b cos + a sin). `inverse` rotates by the negative angle.
template <typename T, int n>
__device__ __forceinline__ void rotate(Piece<T, n>& a, Piece<T, n>& b, const Angles<n>& angles, bool inverse) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const float x = to_float(a.v[j]), y = to_float(b.v[j]), c = angles.cos[j], s = inverse ? -angles.sin[j] : angles.sin[j];
    a.v[j] = from_float<T>(__fsub_rn(__fmul_rn(x, c), __fmul_rn(y, s)));
    b.v[j] = from_float<T>(__fadd_rn(__fmul_rn(y, c), __fmul_rn(x, s)));
  }
}

template <typename T, int n> __device__ __forceinline__ void fill_nan(Piece<T, n>& a, Piece<T, n>& b) {
#pragma unroll
  for (int j = 0; j < n; ++j) a.v[j] = b.v[j] = from_float<T>(__int_as_float(0x7fffffff));
}

// One warp quantizes one head to int8. The scale is max |x| / 127. Each x / scale is rounded half to even (a scale of 0 divides
// as 1, and NaN becomes 0). x is the output k or v, which the block has already written and rounded to T.
template <typename T> __device__ void quantize(const T* x, int8_t* out, float* scale, int64_t d) {
  const int lane = (threadIdx.y * blockDim.x + threadIdx.x) & 31;
  unsigned most = 0;  // bits of the largest |x|: the bits of floats >= 0 compare as the floats do, and NaN is the largest
  for (int64_t i = lane; i < d; i += 32) most = max(most, __float_as_uint(to_float(x[i])) & 0x7fffffffu);
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) most = max(most, __shfl_xor_sync(0xffffffffu, most, step));
  const float size = __fdiv_rn(__uint_as_float(most), 127.0f);
  if (lane == 0) *scale = size;
  const float divisor = size == 0.0f ? 1.0f : size;
  for (int64_t i = lane; i < d; i += 32) {
    const float ratio = __fdiv_rn(to_float(x[i]), divisor);
    out[i] = ratio != ratio ? 0 : static_cast<int8_t>(max(-127, min(127, __float2int_rn(ratio))));
  }
}

// The position of a token and its slot in the cache. place_of also checks both and records a bad one in the error word.
struct Place {
  int64_t position, slot;  // slot: -1 where nothing is written to the cache
  bool inside;             // whether the position is in the tables
};
__device__ __forceinline__ Place place_of(const RopeAngles& angles, const int64_t* slots, int64_t cache_slots, int64_t token,
                                          int* error) {
  Place p;
  p.position = position_of(angles, token);
  p.inside = p.position >= 0 && p.position < angles.length;
  p.slot = slots ? slots[token] : -1;
  const bool outside = p.slot < -1 || p.slot >= cache_slots;
  if (first_thread() && error != nullptr) {
    const int found = (p.inside ? 0 : kQkvRopePositions) | (slots != nullptr && outside ? kQkvRopeSlots : 0);
    if (found != 0) atomicOr(error, found);
  }
  if (outside || !p.inside) p.slot = -1;
  return p;
}

// kCached: there are slots and a cache. Without it the kernel has no pointers to the cache, which saves registers.
template <typename T, int n, bool kCached>
__global__ void __launch_bounds__(256, kCached ? 2 : 3)
qkv_rope_fwd_kernel(const QkvRopeFwd a, int64_t tokens, int* error, bool wide) {
  const int64_t half = a.angles.half, d = 2 * half;
  const unsigned queries = static_cast<unsigned>(a.group), heads = static_cast<unsigned>(a.groups) * (queries + 2);
  for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    const Place place = place_of(a.angles, kCached ? a.slots : nullptr, a.cache_slots, token, error);
    const T* x = static_cast<const T*>(a.qkv) + token * a.token_stride;
    T* k = static_cast<T*>(a.k) + token * a.groups * d;
    T* v = static_cast<T*>(a.v) + token * a.groups * d;
    for (int64_t col = static_cast<int64_t>(threadIdx.x) * n; col < half; col += static_cast<int64_t>(blockDim.x) * n) {
      const Angles<n> angles = angles_at<n>(a.angles, place.position, place.inside, col, wide);
      for (unsigned head = threadIdx.y; head < heads; head += blockDim.y) {
        // kind: below `queries` a query head, `queries` the key head, queries + 1 the value head.
        const unsigned group = head / (queries + 2), kind = head % (queries + 2);
        Piece<T, n> first, second;
        load(first, x + head * d + col, half - col, wide);
        load(second, x + head * d + half + col, half - col, wide);
        if (!place.inside) {
          fill_nan(first, second);
        } else if (kind <= queries) {
          rotate(first, second, angles, false);
        }
        T* out = kind < queries ? static_cast<T*>(a.q) + ((token * a.groups + group) * queries + kind) * d
                                : (kind == queries ? k : v) + group * d;
        store(out + col, first, half - col, wide);
        store(out + half + col, second, half - col, wide);
        if (kCached && kind >= queries && place.slot >= 0 && !a.quantized) {
          T* cache = static_cast<T*>(kind == queries ? a.k_cache : a.v_cache) + (place.slot * a.groups + group) * d;
          store(cache + col, first, half - col, wide);
          store(cache + half + col, second, half - col, wide);
        }
      }
    }
    if (kCached && place.slot >= 0 && a.quantized) {  // all threads of the block take the same branch
      __syncthreads();
      const int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = (blockDim.x * blockDim.y) >> 5;
      for (int64_t i = thread >> 5; i < 2 * a.groups && (thread >> 5) < warps; i += warps) {
        const int64_t group = i >> 1, row = place.slot * a.groups + group;
        if ((i & 1) == 0) {
          quantize(k + group * d, static_cast<int8_t*>(a.k_cache) + row * d, a.k_scale + row, d);
        } else {
          quantize(v + group * d, static_cast<int8_t*>(a.v_cache) + row * d, a.v_scale + row, d);
        }
      }
    }
  }
}

template <typename T, int n>
__global__ void __launch_bounds__(256, 4) qkv_rope_bwd_kernel(const QkvRopeBwd a, int64_t tokens, int* error, bool wide) {
  const int64_t half = a.angles.half, d = 2 * half;
  const unsigned groups = static_cast<unsigned>(a.dk.heads), queries = static_cast<unsigned>(a.dq.heads) / groups;
  const unsigned heads = groups * (queries + 2);
  for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    const Place place = place_of(a.angles, nullptr, 0, token, error);
    T* dx = static_cast<T*>(a.dqkv) + token * heads * d;
    for (int64_t col = static_cast<int64_t>(threadIdx.x) * n; col < half; col += static_cast<int64_t>(blockDim.x) * n) {
      const Angles<n> angles = angles_at<n>(a.angles, place.position, place.inside, col, wide);
      for (unsigned head = threadIdx.y; head < heads; head += blockDim.y) {
        const unsigned group = head / (queries + 2), kind = head % (queries + 2);
        const Heads& from = kind < queries ? a.dq : kind == queries ? a.dk : a.dv;
        const int64_t index = kind < queries ? group * queries + kind : group;
        const T* x = static_cast<const T*>(from.data) + token * from.token_stride + index * from.head_stride;
        Piece<T, n> first, second;
        load(first, x + col, half - col, wide);
        load(second, x + half + col, half - col, wide);
        if (!place.inside) {
          fill_nan(first, second);
        } else if (kind <= queries) {
          rotate(first, second, angles, true);
        }
        store(dx + head * d + col, first, half - col, wide);
        store(dx + head * d + half + col, second, half - col, wide);
      }
    }
  }
}

}}}  // namespace internlm2::cuda::(unnamed)
