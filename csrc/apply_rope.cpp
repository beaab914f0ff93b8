#include "apply_rope.h"

#include "rope_args.h"
#include "threads.h"

namespace internlm2 {
namespace {

std::tuple<Tensor, Tensor> apply_rope_fwd_cpp(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                              const OptTensor& positions, bool interleaved, bool inverse) {
  check_cpu();
  ApplyRope a{dtype_of(q), angles_of("apply_rope", cos, sin, positions), heads_of(q), heads_of(k)};
  Tensor q_out = empty_as(q), k_out = empty_as(k);
  a.q_out = data(q_out);
  a.k_out = data(k_out);
  a.interleaved = interleaved;
  a.inverse = inverse;
  for_rows(q.size(0), grain_of(32768, (a.q.heads + a.k.heads) * q.size(2)),
           [&](int64_t b, int64_t e) { INTERNLM2_CPU(apply_rope, a, b, e); });
  return {q_out, k_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) { INTERNLM2_IMPL(m, "apply_rope_fwd.cpp", apply_rope_fwd_cpp); }

}  // namespace internlm2
