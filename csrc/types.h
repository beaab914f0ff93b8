// Types that bindings and kernels share, in plain C++17 without torch and CUDA.
#pragma once
#include <cstdint>

namespace internlm2 {

enum class Dtype : int { f32, bf16, f16, f64, i32, i64, i8 };

// Bits of a CUDA device's error word (runtime.h). internlm2_kernels/_device_errors.py knows them by number: append, never
// renumber.
enum DeviceError : int { kQkvRopePositions = 1 << 1, kQkvRopeSlots = 1 << 2 };

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// A contiguous tensor of one dimension, to read and to write.
struct In { Dtype dtype; const void* data; };
struct Out { Dtype dtype; void* data; };

// Row i of a tensor begins at (i / inner) * outer_stride + (i % inner) * inner_stride; strides in elements.
struct Rows {
  int64_t outer, inner, outer_stride, inner_stride;
#ifdef __CUDACC__
  __host__ __device__
#endif
  int64_t count() const { return outer * inner; }
#ifdef __CUDACC__
  __host__ __device__
#endif
  int64_t offset(int64_t i) const {
    return inner == 1 ? i * outer_stride : (i / inner) * outer_stride + (i % inner) * inner_stride;
  }
};

}  // namespace internlm2

// Declare the given CPU kernels once for each instruction set that they are built for; used inside namespace internlm2. Kernels
// made of matrix products are built for two more (runtime.h).
#define INTERNLM2_CPU_KERNELS(...) \
  namespace cpu { namespace AVX2 { __VA_ARGS__ } namespace AVX512 { __VA_ARGS__ } }
#define INTERNLM2_CPU_MATRIX_KERNELS(...) \
  INTERNLM2_CPU_KERNELS(__VA_ARGS__)      \
  namespace cpu { namespace AVX512_BF16 { __VA_ARGS__ } namespace AMX { __VA_ARGS__ } }
