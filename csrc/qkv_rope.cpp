#include "qkv_rope.h"

#include <algorithm>

#include "stable.h"

namespace internlm2 {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

int64_t grain(int64_t width) { return std::max<int64_t>(1, 32768 / width); }

// Allocates q, k, v and fills in all but the cache.
Outputs prepare(QkvRopeFwd& a, const Tensor& qkv, int64_t num_heads, int64_t num_kv_heads) {
  const int64_t tokens = qkv.size(0), d = 2 * a.angles.half;
  Tensor q = torch::stable::new_empty(qkv, {tokens, num_heads, d});
  Tensor k = torch::stable::new_empty(qkv, {tokens, num_kv_heads, d});
  Tensor v = torch::stable::new_empty(qkv, {tokens, num_kv_heads, d});
  a.dtype = dtype_of(qkv);
  a.qkv = cdata(qkv);
  a.token_stride = qkv.stride(0);
  a.groups = num_kv_heads;
  a.group = num_heads / num_kv_heads;
  a.q = data(q);
  a.k = data(k);
  a.v = data(v);
  return {q, k, v};
}

void add_cache(QkvRopeFwd& a, const Tensor& k_cache, const Tensor& v_cache, const OptTensor& k_scale,
               const OptTensor& v_scale, const Tensor& slots) {
  a.slots = static_cast<const int64_t*>(cdata(slots));
  a.cache_slots = k_cache.size(0) * k_cache.size(1);
  a.quantized = k_scale.has_value();
  a.k_cache = data(k_cache);
  a.v_cache = data(v_cache);
  a.k_scale = a.quantized ? static_cast<float*>(data(*k_scale)) : nullptr;
  a.v_scale = a.quantized ? static_cast<float*>(data(*v_scale)) : nullptr;
}

Outputs qkv_rope_fwd_cpp(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
                         int64_t num_heads, int64_t num_kv_heads) {
  check_cpu();
  QkvRopeFwd a{};
  a.angles = angles_of("qkv_rope: positions", cos, sin, positions);
  Outputs out = prepare(a, qkv, num_heads, num_kv_heads);
  for_rows(qkv.size(0), grain(qkv.size(1)), [&](int64_t b, int64_t e) { INTERNLM2_CPU(qkv_rope_fwd, a, b, e); });
  return out;
}

Outputs qkv_rope_cache_fwd_cpp(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
                               int64_t num_heads, int64_t num_kv_heads, const Tensor& k_cache, const Tensor& v_cache,
                               const OptTensor& k_scale, const OptTensor& v_scale, const Tensor& slots) {
  check_cpu();
  QkvRopeFwd a{};
  a.angles = angles_of("qkv_rope: positions", cos, sin, positions);
  add_cache(a, k_cache, v_cache, k_scale, v_scale, slots);
  check_range("qkv_rope: cache.slots", slots, -1, a.cache_slots);
  Outputs out = prepare(a, qkv, num_heads, num_kv_heads);
  for_rows(qkv.size(0), grain(qkv.size(1)), [&](int64_t b, int64_t e) { INTERNLM2_CPU(qkv_rope_fwd, a, b, e); });
  return out;
}

Tensor qkv_rope_bwd_cpp(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& cos, const Tensor& sin,
                        const OptTensor& positions) {
  check_cpu();
  QkvRopeBwd a{dtype_of(dq), angles_of("qkv_rope: positions", cos, sin, positions), heads_of(dq), heads_of(dk), heads_of(dv)};
  const int64_t width = (a.dq.heads + 2 * a.dk.heads) * dq.size(2);
  Tensor dqkv = torch::stable::new_empty(dq, {dq.size(0), width});
  a.dqkv = data(dqkv);
  for_rows(dq.size(0), grain(width), [&](int64_t b, int64_t e) { INTERNLM2_CPU(qkv_rope_bwd, a, b, e); });
  return dqkv;
}

#ifdef INTERNLM2_CUDA
Outputs qkv_rope_fwd_cuda(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
                          int64_t num_heads, int64_t num_kv_heads) {
  check_cuda_dtype(qkv);
  const CudaScope scope(qkv);
  QkvRopeFwd a{};
  a.angles = angles_of(nullptr, cos, sin, positions);
  Outputs out = prepare(a, qkv, num_heads, num_kv_heads);
  check_launch(cuda::qkv_rope_fwd(a, qkv.size(0), error_word(scope.device()), scope.stream()));
  return out;
}

Outputs qkv_rope_cache_fwd_cuda(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
                                int64_t num_heads, int64_t num_kv_heads, const Tensor& k_cache, const Tensor& v_cache,
                                const OptTensor& k_scale, const OptTensor& v_scale, const Tensor& slots) {
  check_cuda_dtype(qkv);
  const CudaScope scope(qkv);
  QkvRopeFwd a{};
  a.angles = angles_of(nullptr, cos, sin, positions);
  add_cache(a, k_cache, v_cache, k_scale, v_scale, slots);
  Outputs out = prepare(a, qkv, num_heads, num_kv_heads);
  check_launch(cuda::qkv_rope_fwd(a, qkv.size(0), error_word(scope.device()), scope.stream()));
  return out;
}

Tensor qkv_rope_bwd_cuda(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& cos, const Tensor& sin,
                         const OptTensor& positions) {
  check_cuda_dtype(dq);
  const CudaScope scope(dq);
  QkvRopeBwd a{dtype_of(dq), angles_of(nullptr, cos, sin, positions), heads_of(dq), heads_of(dk), heads_of(dv), nullptr};
  Tensor dqkv = torch::stable::new_empty(dq, {dq.size(0), (a.dq.heads + 2 * a.dk.heads) * dq.size(2)});
  a.dqkv = data(dqkv);
  check_launch(cuda::qkv_rope_bwd(a, dq.size(0), error_word(scope.device()), scope.stream()));
  return dqkv;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "qkv_rope_fwd.cpp", qkv_rope_fwd_cpp);
  INTERNLM2_IMPL(m, "qkv_rope_cache_fwd.cpp", qkv_rope_cache_fwd_cpp);
  INTERNLM2_IMPL(m, "qkv_rope_bwd.cpp", qkv_rope_bwd_cpp);
}

#ifdef INTERNLM2_CUDA
STABLE_TORCH_LIBRARY_IMPL(internlm2, CUDA, m) {
  INTERNLM2_IMPL(m, "qkv_rope_fwd.cuda", qkv_rope_fwd_cuda);
  INTERNLM2_IMPL(m, "qkv_rope_cache_fwd.cuda", qkv_rope_cache_fwd_cuda);
  INTERNLM2_IMPL(m, "qkv_rope_bwd.cuda", qkv_rope_bwd_cuda);
}
#endif

}  // namespace internlm2
