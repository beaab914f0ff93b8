// Rotary embedding of q and k: the arguments that the binding passes to the kernels, as raw pointers. Formulas:
// internlm2_kernels/ops/apply_rope.py.
#pragma once
#include "rope_angles.h"

namespace internlm2 {

struct ApplyRope {
  Dtype dtype;
  RopeAngles angles;
  Heads q, k;
  void *q_out, *k_out;  // contiguous [tokens, heads, d]
  bool interleaved;     // pairs (2i, 2i + 1) instead of (i, i + d/2)
  bool inverse;         // rotate by the negative angle, as the backward does
};

INTERNLM2_CPU_KERNELS(void apply_rope(const ApplyRope& a, int64_t first_token, int64_t last_token);)

}  // namespace internlm2
