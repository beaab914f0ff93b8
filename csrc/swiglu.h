// Gated activation: the arguments that the binding passes to the kernels, as raw pointers. Formulas:
// internlm2_kernels/ops/swiglu.py.
#pragma once
#include "types.h"

namespace internlm2 {

struct SwigluFwd {
  Dtype dtype;
  Rows gate_rows, up_rows;
  const void *gate, *up;
  void* y;  // contiguous [rows, cols]
  int64_t cols;
};

struct SwigluBwd {
  Dtype dtype;
  Rows dy_rows, gate_rows, up_rows;
  const void *dy, *gate, *up;
  void *dgate, *dup;   // row i of each begins at i * out_stride
  int64_t out_stride;  // cols, or 2 * cols where both are halves of one tensor
  int64_t cols;
};

// Elements [begin, end) are counted through all rows, so that one long row is distributed over threads as well as many short
// ones.
INTERNLM2_CPU_KERNELS(
  void swiglu_fwd(const SwigluFwd& a, int64_t begin, int64_t end);
  void swiglu_bwd(const SwigluBwd& a, int64_t begin, int64_t end);)

}  // namespace internlm2
