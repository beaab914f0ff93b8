// Split of the packed projection, rotation and write to the paged cache: the arguments that the binding passes to the kernels,
// as raw pointers. Formulas and layout: internlm2_kernels/ops/qkv_rope.py.
#pragma once
#include "rope_angles.h"

namespace internlm2 {

struct QkvRopeFwd {
  Dtype dtype;
  RopeAngles angles;
  const void* qkv;  // [tokens, groups * (group + 2) * d]: each group has its queries, then its key, then its value
  int64_t token_stride, groups, group;
  void *q, *k, *v;  // contiguous: q [tokens, groups * group, d], k and v [tokens, groups, d]
  // The paged cache, used where slots is not null:
  const int64_t* slots;  // [tokens]: block * block_size + offset, -1 for none
  int64_t cache_slots;   // blocks * block_size
  bool quantized;        // k_cache and v_cache are int8 with scales; otherwise they have `dtype`
  void *k_cache, *v_cache;     // contiguous [cache_slots, groups, d]
  float *k_scale, *v_scale;    // contiguous [cache_slots, groups]
};

struct QkvRopeBwd {
  Dtype dtype;
  RopeAngles angles;
  Heads dq, dk, dv;
  void* dqkv;  // contiguous
};

INTERNLM2_CPU_KERNELS(
  void qkv_rope_fwd(const QkvRopeFwd& a, int64_t first_token, int64_t last_token);
  void qkv_rope_bwd(const QkvRopeBwd& a, int64_t first_token, int64_t last_token);)

// CUDA. f64 is not supported, and cos and sin are f32. A token whose position is out of range gets NaN; with a position or slot
// out of range nothing is written to the cache, and the DeviceError bit of the argument is set in *error. Returns the error of
// the launch, or null.
namespace cuda {
const char* qkv_rope_fwd(const QkvRopeFwd& a, int64_t tokens, int* error, void* stream);
const char* qkv_rope_bwd(const QkvRopeBwd& a, int64_t tokens, int* error, void* stream);
}  // namespace cuda

}  // namespace internlm2
