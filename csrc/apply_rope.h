// Rotary embedding of q and k: the raw-pointer contract. Formulas: internlm2_kernels/ops/apply_rope.py.
#pragma once
#include "rope_table.h"

namespace internlm2 {

struct ApplyRope {
  Dtype dtype;
  RopeAngles angles;
  Heads q, k;
  void *q_out, *k_out;  // contiguous [tokens, heads, d]
  bool interleaved;     // pairs (2i, 2i + 1) instead of (i, i + d/2)
  bool inverse;         // by the negative angle: the backward
};

#define INTERNLM2_APPLY_ROPE_CPU void apply_rope(const ApplyRope& a, int64_t begin, int64_t end); /* tokens */

namespace cpu {
namespace AVX2 { INTERNLM2_APPLY_ROPE_CPU }
namespace AVX512 { INTERNLM2_APPLY_ROPE_CPU }
}  // namespace cpu

}  // namespace internlm2
