// From a dtype tag to a template argument: WITH_STORAGE(dtype, T, { ... }) runs the block with T as the storage type.
#pragma once
#include "simd/vec.h"

#if defined(CPU_CAPABILITY_AMX)  // this build serves bfloat16 only (INTERNLM2_CPU_MATRIX)
#define WITH_STORAGE(tag, T, ...)                                          \
  if ((tag) == ::internlm2::Dtype::bf16) {                                 \
    using T = ::internlm2::bf16;                                           \
    __VA_ARGS__                                                            \
  }
#else
#define WITH_STORAGE(tag, T, ...)                                        \
  switch (tag) {                                                         \
    case ::internlm2::Dtype::f32: { using T = float; __VA_ARGS__ } break; \
    case ::internlm2::Dtype::bf16: { using T = ::internlm2::bf16; __VA_ARGS__ } break; \
    case ::internlm2::Dtype::f16: { using T = ::internlm2::f16; __VA_ARGS__ } break;   \
    case ::internlm2::Dtype::f64: { using T = double; __VA_ARGS__ } break; \
    default: break;                                                      \
  }
#endif

// WITH_ACC(dtype, Acc, { ... }) runs the block with Acc as the accumulator's type: double for f64, otherwise float.
#define WITH_ACC(tag, Acc, ...)                                               \
  if ((tag) == ::internlm2::Dtype::f64) { using Acc = double; __VA_ARGS__ }   \
  else { using Acc = float; __VA_ARGS__ }
