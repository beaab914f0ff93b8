#include "qkv_rope.h"

#include "rope_args.h"
#include "threads.h"

namespace internlm2 {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

struct Cache {
  const Tensor &k, &v;
  const OptTensor &k_scale, &v_scale;
  const Tensor& slots;
};

// Allocates q, k and v and calls run(arguments, tokens), which writes them. Positions and slots are checked here, with errors
// of operator `op`; where `op` is null (CUDA), the kernel checks them.
template <typename Run>
Outputs forward(const char* op, const Tensor& qkv, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
                int64_t num_heads, int64_t num_kv_heads, const Cache* cache, const Run& run) {
  QkvRopeFwd a{};
  a.angles = angles_of(op, cos, sin, positions);
  if (cache != nullptr) {
    a.slots = static_cast<const int64_t*>(cdata(cache->slots));
    a.cache_slots = cache->k.size(0) * cache->k.size(1);
    a.quantized = cache->k_scale.has_value();
    a.k_cache = data(cache->k);
    a.v_cache = data(cache->v);
    a.k_scale = a.quantized ? static_cast<float*>(data(*cache->k_scale)) : nullptr;
    a.v_scale = a.quantized ? static_cast<float*>(data(*cache->v_scale)) : nullptr;
    if (op != nullptr) check_range(op, "cache.slots", cache->slots, -1, a.cache_slots);
  }
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
  run(a, tokens);
  return {q, k, v};
}

template <typename Run>
Tensor backward(const char* op, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& cos, const Tensor& sin,
                const OptTensor& positions, const Run& run) {
  QkvRopeBwd a{dtype_of(dq), angles_of(op, cos, sin, positions), heads_of(dq), heads_of(dk), heads_of(dv), nullptr};
  Tensor dqkv = torch::stable::new_empty(dq, {dq.size(0), (a.dq.heads + 2 * a.dk.heads) * dq.size(2)});
  a.dqkv = data(dqkv);
  run(a, dq.size(0), dqkv.size(1));
  return dqkv;
}

Outputs forward_cpu(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const OptTensor& positions, int64_t num_heads,
                    int64_t num_kv_heads, const Cache* cache) {
  check_cpu();
  return forward("qkv_rope", qkv, cos, sin, positions, num_heads, num_kv_heads, cache,
                 [&](const QkvRopeFwd& a, int64_t tokens) {
                   for_rows(tokens, grain_of(32768, qkv.size(1)),
                            [&](int64_t b, int64_t e) { INTERNLM2_CPU(qkv_rope_fwd, a, b, e); });
                 });
}

Outputs qkv_rope_fwd_cpp(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
                         int64_t num_heads, int64_t num_kv_heads) {
  return forward_cpu(qkv, cos, sin, positions, num_heads, num_kv_heads, nullptr);
}

Outputs qkv_rope_cache_fwd_cpp(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
                               int64_t num_heads, int64_t num_kv_heads, const Tensor& k_cache, const Tensor& v_cache,
                               const OptTensor& k_scale, const OptTensor& v_scale, const Tensor& slots) {
  const Cache cache{k_cache, v_cache, k_scale, v_scale, slots};
  return forward_cpu(qkv, cos, sin, positions, num_heads, num_kv_heads, &cache);
}

Tensor qkv_rope_bwd_cpp(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& cos, const Tensor& sin,
                        const OptTensor& positions) {
  check_cpu();
  return backward("qkv_rope", dq, dk, dv, cos, sin, positions, [](const QkvRopeBwd& a, int64_t tokens, int64_t width) {
    for_rows(tokens, grain_of(32768, width), [&](int64_t b, int64_t e) { INTERNLM2_CPU(qkv_rope_bwd, a, b, e); });
  });
}

#ifdef INTERNLM2_CUDA
Outputs forward_cuda(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const OptTensor& positions, int64_t num_heads,
                     int64_t num_kv_heads, const Cache* cache) {
  check_cuda_dtype(qkv);
  const CudaScope scope(qkv);
  return forward(nullptr, qkv, cos, sin, positions, num_heads, num_kv_heads, cache,
                 [&](const QkvRopeFwd& a, int64_t tokens) {
                   check_launch(cuda::qkv_rope_fwd(a, tokens, error_word(scope.device()), scope.stream()));
                 });
}

Outputs qkv_rope_fwd_cuda(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
                          int64_t num_heads, int64_t num_kv_heads) {
  return forward_cuda(qkv, cos, sin, positions, num_heads, num_kv_heads, nullptr);
}

Outputs qkv_rope_cache_fwd_cuda(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
                                int64_t num_heads, int64_t num_kv_heads, const Tensor& k_cache, const Tensor& v_cache,
                                const OptTensor& k_scale, const OptTensor& v_scale, const Tensor& slots) {
  const Cache cache{k_cache, v_cache, k_scale, v_scale, slots};
  return forward_cuda(qkv, cos, sin, positions, num_heads, num_kv_heads, &cache);
}

Tensor qkv_rope_bwd_cuda(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& cos, const Tensor& sin,
                         const OptTensor& positions) {
  check_cuda_dtype(dq);
  const CudaScope scope(dq);
  return backward(nullptr, dq, dk, dv, cos, sin, positions, [&](const QkvRopeBwd& a, int64_t tokens, int64_t) {
    check_launch(cuda::qkv_rope_bwd(a, tokens, error_word(scope.device()), scope.stream()));
  });
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
