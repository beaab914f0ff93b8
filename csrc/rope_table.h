// Tables of cos and sin for the rotary embedding: the arguments that the binding passes to the kernels, as raw pointers.
// Formulas: internlm2_kernels/ops/rope_table.py.
#pragma once
#include "types.h"

namespace internlm2 {

struct RopeTableFwd {
  Dtype positions_dtype;  // i32 or i64
  const void* positions;
  const double* inv_freq;  // [half]; with float32_angles the values are exact in float
  float *cos, *sin;        // contiguous [rows, half]
  int64_t half;
  double divisor, magnitude;  // positions are divided by `divisor`; cos and sin are multiplied with `magnitude`
  bool float32_angles;        // position / divisor * inv_freq in float, as the released model computes it
};

INTERNLM2_CPU_KERNELS(void rope_table_fwd(const RopeTableFwd& a, int64_t first_row, int64_t last_row);)

}  // namespace internlm2
