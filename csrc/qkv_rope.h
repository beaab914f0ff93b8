// Split of the packed projection, rotation, paged cache write: the raw-pointer contract.
// Formulas and layout: internlm2_kernels/ops/qkv_rope.py.
#pragma once
#include "rope_table.h"

namespace internlm2 {

struct QkvRopeFwd {
  Dtype dtype;
  RopeAngles angles;
  const void* qkv;  // [tokens, groups * (group + 2) * d]: in each group its queries, its key, its value
  int64_t token_stride, groups, group;
  void *q, *k, *v;  // contiguous [tokens, heads, d], [tokens, groups, d] twice
  // Paged cache, where slots is not null:
  const int64_t* slots;  // [tokens]: block * block_size + offset, -1 for none
  int64_t cache_slots;   // blocks * block_size
  bool quantized;        // k_cache and v_cache int8, else dtype
  void *k_cache, *v_cache;     // contiguous [cache_slots, groups, d]
  float *k_scale, *v_scale;    // contiguous [cache_slots, groups]
};

struct QkvRopeBwd {
  Dtype dtype;
  RopeAngles angles;
  Heads dq, dk, dv;
  void* dqkv;  // contiguous
};

#define INTERNLM2_QKV_ROPE_CPU                                           \
  void qkv_rope_fwd(const QkvRopeFwd& a, int64_t begin, int64_t end);    \
  void qkv_rope_bwd(const QkvRopeBwd& a, int64_t begin, int64_t end); /* tokens */

namespace cpu {
namespace AVX2 { INTERNLM2_QKV_ROPE_CPU }
namespace AVX512 { INTERNLM2_QKV_ROPE_CPU }
}  // namespace cpu

// No f64, tables f32; an index out of range sets its bit in *error, makes its token NaN and touches nothing else. Returns
// what went wrong at the launch, or null.
namespace cuda {
const char* qkv_rope_fwd(const QkvRopeFwd& a, int64_t tokens, int* error, void* stream);
const char* qkv_rope_bwd(const QkvRopeBwd& a, int64_t tokens, int* error, void* stream);
}  // namespace cuda

}  // namespace internlm2
