#include "../log_barrier_penalty.h"

#include "elementwise.h"
#include "log_barrier.h"
#include "simd/log.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

template <typename Acc> void barrier_fwd(const LogBarrier& a, int64_t begin, int64_t end) {
  using V = Vec<Acc>;
  const Edge edge(a.bound, a.margin);
  const V at(static_cast<Acc>(edge.at)), bound(static_cast<Acc>(a.bound)), margin(static_cast<Acc>(a.margin));
  const auto fill = [&](int64_t i, int64_t n, const Acc* rewards) VEC_LAMBDA {
    Acc* penalty = static_cast<Acc*>(a.penalty) + i;
    for_vectors<V, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
      const V x = load<V>(rewards + j, lanes), size = magnitude(x), near = min(at, size);  // NaN stays NaN
      const V inside = V(0) - (log(bound + near) + log(max(margin, bound - near)));
      const V beyond = a.clamp ? V(static_cast<Acc>(edge.value))
                               : fma(V(static_cast<Acc>(edge.slope)), size - at, V(static_cast<Acc>(edge.value)));
      store(penalty + j, pick(less(at, size), beyond, inside), lanes);
    });
  };
  for_blocks<Acc>(begin, end, fill, a.rewards);
}

// The derivative of the barrier is 1 / (bound - x) - 1 / (bound + x) = 2 x / ((bound - x) (bound + x)).
template <typename Acc> void barrier_bwd(const LogBarrier& a, int64_t begin, int64_t end) {
  using V = Vec<Acc>;
  const Edge edge(a.bound, a.margin);
  const V at(static_cast<Acc>(edge.at)), bound(static_cast<Acc>(a.bound)), margin(static_cast<Acc>(a.margin));
  const V slope(static_cast<Acc>(a.clamp ? 0 : edge.slope));
  const auto fill = [&](int64_t i, int64_t n, const Acc* rewards, Acc* drewards) VEC_LAMBDA {
    const Acc* dpenalty = static_cast<const Acc*>(a.dpenalty) + i;
    for_vectors<V, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
      const V x = load<V>(rewards + j, lanes), near = min(at, max(V(0) - at, x));
      const V inside = (near + near) / (max(margin, bound - near) * max(margin, bound + near));
      const V beyond = pick(less(x, V(0)), V(0) - slope, slope);
      store(drewards + j, load<V>(dpenalty + j, lanes) * pick(less(at, magnitude(x)), beyond, inside), lanes);
    });
  };
  for_blocks<Acc>(begin, end, fill, a.rewards, a.drewards);
}

}  // namespace

void log_barrier_penalty_fwd(const LogBarrier& a, int64_t begin, int64_t end) {
  WITH_ACC(a.acc, Acc, { barrier_fwd<Acc>(a, begin, end); })
}

void log_barrier_penalty_bwd(const LogBarrier& a, int64_t begin, int64_t end) {
  WITH_ACC(a.acc, Acc, { barrier_bwd<Acc>(a, begin, end); })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
