// From a run-time dtype tag to a template argument: WITH_STORAGE(dtype, T, { ... }) runs the block with T defined.
#pragma once
#include "simd/vec.h"

#if defined(CPU_CAPABILITY_AMX)  // the build of bfloat16 alone (INTERNLM2_CPU_MATRIX)
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

// The same for what is computed in the accumulator's type alone: double for f64, else float.
#define WITH_ACC(tag, Acc, ...)                                               \
  if ((tag) == ::internlm2::Dtype::f64) { using Acc = double; __VA_ARGS__ }   \
  else { using Acc = float; __VA_ARGS__ }
