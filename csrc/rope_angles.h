// Shared by the kernels of the rotary embedding: the tables of cos and sin, and the row of them that holds each token's angles.
#pragma once
#include "types.h"

namespace internlm2 {

// Token t uses row positions[t] of cos and sin, or row t where positions is null.
struct RopeAngles {
  Dtype dtype;            // of cos and sin: f32, or f64 (with f64 activations)
  Dtype positions_dtype;  // i32 or i64
  const void *cos, *sin;  // contiguous [length, half]
  const void* positions;
  int64_t length, half;
};

// A strided tensor [tokens, heads, 2 * half]; strides in elements.
struct Heads {
  const void* data;
  int64_t heads, token_stride, head_stride;
};

}  // namespace internlm2
