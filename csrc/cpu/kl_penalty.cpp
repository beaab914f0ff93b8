#include "../kl_penalty.h"

#include "elementwise.h"
#include "simd/log.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

// x with 0 in the lanes whose entry is masked. Lane 0 is entry `at`.
template <typename V, typename N> VEC_INLINE V counted(const KlPenalty& a, int64_t at, N lanes, V x) {
  return a.mask == nullptr ? x : only(true_lanes<V>(a.mask + at, lanes), x);
}

template <typename Acc> void kl_fwd(const KlPenalty& a, int64_t begin, int64_t end) {
  using V = Vec<Acc>;
  const auto fill = [&](int64_t i, int64_t n, const Acc* logprobs, const Acc* ref) VEC_LAMBDA {
    Acc* kl = static_cast<Acc*>(a.kl) + i;
    for_vectors<V, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
      const V l = counted(a, i + j, lanes, load<V>(logprobs + j, lanes) - load<V>(ref + j, lanes));
      if (a.estimator == 1) return store(kl + j, l, lanes);
      store(kl + j, a.estimator == 2 ? V(Acc(0.5)) * l * l : expm1_minus(V(0) - l), lanes);
    });
  };
  for_blocks<Acc>(begin, end, fill, a.logprobs, a.ref_logprobs);
}

// With l = logprobs - ref_logprobs, the derivative of kl with respect to l is 1 for k1, l for k2 and 1 - exp(-l) for k3.
template <typename Acc> void kl_bwd(const KlPenalty& a, int64_t begin, int64_t end) {
  using V = Vec<Acc>;
  const auto fill = [&](int64_t i, int64_t n, const Acc* logprobs, const Acc* ref, Acc* out, Acc* dref) VEC_LAMBDA {
    const Acc* dkl = static_cast<const Acc*>(a.dkl) + i;
    for_vectors<V, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
      const V l = counted(a, i + j, lanes, load<V>(logprobs + j, lanes) - load<V>(ref + j, lanes));
      const V up = counted(a, i + j, lanes, load<V>(dkl + j, lanes));
      const V slope = a.estimator == 1 ? V(1) : a.estimator == 2 ? l : V(0) - expm1(V(0) - l);
      store(out + j, up * slope, lanes);
      if (dref != nullptr) store(dref + j, V(0) - up * slope, lanes);
    });
  };
  for_blocks<Acc>(begin, end, fill, a.logprobs, a.ref_logprobs, a.dlogprobs, a.dref);
}

}  // namespace

void kl_penalty_fwd(const KlPenalty& a, int64_t begin, int64_t end) {
  WITH_ACC(a.acc, Acc, { kl_fwd<Acc>(a, begin, end); })
}
void kl_penalty_bwd(const KlPenalty& a, int64_t begin, int64_t end) {
  WITH_ACC(a.acc, Acc, { kl_bwd<Acc>(a, begin, end); })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
