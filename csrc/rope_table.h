// Rotary tables: their raw-pointer contract, and how kernels that rotate see them. Formulas: internlm2_kernels/ops/.
#pragma once
#include "types.h"

namespace internlm2 {

struct RopeTableFwd {
  Dtype positions_dtype;  // i32 or i64
  const void* positions;
  const double* inv_freq;  // [half]; with float32_angles, values of float
  float *cos, *sin;        // contiguous [rows, half]
  int64_t half;
  double divisor, magnitude;  // of positions; on cos and sin
  bool float32_angles;        // position / divisor * inv_freq in float, as the released model computes it
};

// The angles of every token: row positions[token] of cos and sin, row `token` where positions is null.
struct RopeAngles {
  Dtype dtype;            // of cos and sin: f32, or f64 (with f64 activations)
  Dtype positions_dtype;  // i32 or i64
  const void *cos, *sin;  // contiguous [length, half]
  const void* positions;
  int64_t length, half;
};

// Heads of a token in a strided tensor [tokens, heads, 2 * half]; strides in elements.
struct Heads {
  const void* data;
  int64_t heads, token_stride, head_stride;
};

#define INTERNLM2_ROPE_TABLE_CPU void rope_table_fwd(const RopeTableFwd& a, int64_t begin, int64_t end);

namespace cpu {
namespace AVX2 { INTERNLM2_ROPE_TABLE_CPU }
namespace AVX512 { INTERNLM2_ROPE_TABLE_CPU }
}  // namespace cpu

}  // namespace internlm2
