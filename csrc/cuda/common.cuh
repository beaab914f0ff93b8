// Shared by the CUDA kernels, without any torch header: 16-byte pieces of rows, conversions and reductions.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../types.h"

namespace internlm2 { namespace cuda { namespace {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
template <typename T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }
template <> __device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }

// A piece is the kPiece<T> elements of T that one 16-byte access moves. Threads divide a row into pieces whether or not the row
// is aligned, so that the order of every sum depends on the row's length alone.
template <typename T> constexpr int kPiece = 16 / static_cast<int>(sizeof(T));

template <typename T, int n = kPiece<T>> struct alignas(16) Piece {
  T v[n];
};

// `wide` promises that p is 16-byte aligned and that all n elements exist. Without it, load reads the first `valid` elements
// one by one and sets the rest to 0, and store writes the first `valid` elements.
template <typename T, int n> __device__ __forceinline__ void load(Piece<T, n>& out, const T* p, int64_t valid, bool wide) {
  if (wide) {
#pragma unroll
    for (int i = 0; i < n; i += kPiece<T>) {
      *reinterpret_cast<uint4*>(out.v + i) = *reinterpret_cast<const uint4*>(p + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) out.v[i] = i < valid ? p[i] : from_float<T>(0.0f);
  }
}
template <typename T, int n> __device__ __forceinline__ void store(T* p, const Piece<T, n>& x, int64_t valid, bool wide) {
  if (wide) {
#pragma unroll
    for (int i = 0; i < n; i += kPiece<T>) {
      *reinterpret_cast<uint4*>(p + i) = *reinterpret_cast<const uint4*>(x.v + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i < valid) p[i] = x.v[i];
    }
  }
}

// Returns to every thread the sum of `value` over threadIdx.x: a butterfly of shuffles within each warp, then one over the sums
// of the warps. blockDim.x must be a multiple of 32. Where it is more than 32, blockDim.y must be 1 and `scratch` must hold 32
// floats of shared memory; between two calls with the same scratch the caller needs a __syncthreads().
__device__ __forceinline__ float sum_over_x(float value, float* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (blockDim.x == 32) return value;
  const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  if (lane == 0) scratch[threadIdx.x >> 5] = value;
  __syncthreads();
  value = lane < warps ? scratch[lane] : 0.0f;
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// ---------------------------------------------------------------------------------------------------------- host
inline bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

template <typename T> inline bool aligned(const Rows& r) {
  return r.outer_stride % kPiece<T> == 0 && (r.inner == 1 || r.inner_stride % kPiece<T> == 0);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The grid size for `blocks` blocks of work. Where it is at its limit, blocks take more work in a grid-stride loop.
inline unsigned grid_for(int64_t blocks) {
  constexpr int64_t most = 0x7fffffff;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}}}  // namespace internlm2::cuda::(unnamed)

// WITH_CUDA_STORAGE(dtype, T, { ... }) runs the block with T defined. The binding refuses all other dtypes.
#define WITH_CUDA_STORAGE(tag, T, ...)                                      \
  switch (tag) {                                                            \
    case ::internlm2::Dtype::f32: { using T = float; __VA_ARGS__ } break;   \
    case ::internlm2::Dtype::bf16: { using T = __nv_bfloat16; __VA_ARGS__ } break; \
    case ::internlm2::Dtype::f16: { using T = __half; __VA_ARGS__ } break;  \
    default: break;                                                         \
  }
