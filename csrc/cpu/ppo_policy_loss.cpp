#include <algorithm>

#include "ppo_loss.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

constexpr double kMostRatio = 20;  // the log-ratio logprobs - old_logprobs is bounded to [-20, 20] before exp

// The clipping that forward and backward share. A NaN is passed on, because no comparison with it is true.
template <typename Acc> struct Policy {
  using V = Vec<Acc>;
  V low, high;
  explicit Policy(double clip) : low(static_cast<Acc>(1 - clip)), high(static_cast<Acc>(1 + clip)) {}
  VEC_INLINE V bounded(V ratio, V advantage) const { return min(high, max(low, ratio)) * advantage; }
};

template <typename Acc> void policy_fwd(const PpoLoss& a, int64_t chunk) {
  using V = Vec<Acc>;
  const Policy<Acc> policy(a.clip);
  // A clipped term is A (1 + clip) where the advantage A is positive, and A (1 - clip) where it is negative. `raised` and
  // `lowered` sum A of either kind, and the factor is applied to the sum, in double. `free` sums the terms that are not
  // clipped.
  WideSum free, raised, lowered, kl;
  V clipped_terms, count;
  const auto add = [&](int64_t i, int64_t n, const Acc* logprobs, const Acc* old, const Acc* advantages) VEC_LAMBDA {
    for_vectors<V, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
      const auto keep = true_lanes<V>(a.mask + i + j, lanes);
      const V difference = load<V>(logprobs + j, lanes) - load<V>(old + j, lanes);
      const V x = only(keep, min(V(Acc(kMostRatio)), max(V(Acc(-kMostRatio)), difference)));
      const auto e = exp_terms(x);
      const V ratio = e.whole, advantage = only(keep, load<V>(advantages + j, lanes));
      const auto clipped = less(policy.bounded(ratio, advantage), ratio * advantage);
      const V pinned = only(clipped, advantage);
      free.add_product(ratio, pick(clipped, V(0), advantage));
      raised.add(max(V(0), pinned));
      lowered.add(min(V(0), pinned));
      clipped_terms = clipped_terms + only(clipped, V(1));
      kl.add(expm1_minus(x, e));
      count = count + only(keep, V(1));
    });
  };
  for_blocks<Acc>(chunk * kPpoChunk, std::min(a.n, (chunk + 1) * kPpoChunk), add, a.x, a.old, a.target);
  double* out = a.partial + chunk * kPolicySums;
  out[0] = free.sum() + (1 + a.clip) * raised.sum() + (1 - a.clip) * lowered.sum();
  out[1] = clipped_terms.sum();
  out[2] = kl.sum();
  out[3] = count.sum();
}

template <typename Acc> void policy_total(const PpoLoss& a) {
  double sums[kPolicySums] = {};
  for (int64_t chunk = 0; chunk * kPpoChunk < a.n; ++chunk) {
    for (int k = 0; k < kPolicySums; ++k) sums[k] += a.partial[chunk * kPolicySums + k];
  }
  put_results<Acc>(a, -sums[0], sums[1], over(sums[2], sums[3]), sums[3]);
}

template <typename Acc> void policy_bwd(const PpoLoss& a, int64_t begin, int64_t end) {
  using V = Vec<Acc>;
  const Policy<Acc> policy(a.clip);
  const V scale(-upstream<Acc>(a)), most(static_cast<Acc>(kMostRatio));
  const auto fill = [&](int64_t i, int64_t n, const Acc* logprobs, const Acc* old, const Acc* advantages,
                        Acc* dlogprobs) VEC_LAMBDA {
    for_vectors<V, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
      const V x = load<V>(logprobs + j, lanes) - load<V>(old + j, lanes), advantage = load<V>(advantages + j, lanes);
      const V ratio = exp(min(most, max(V(0) - most, x))), full = ratio * advantage;
      const V through = pick(less(policy.bounded(ratio, advantage), full), V(0), full * scale);
      const V near = pick(less(most, magnitude(x)), V(0), through);
      store(dlogprobs + j, only(true_lanes<V>(a.mask + i + j, lanes), near), lanes);
    });
  };
  for_blocks<Acc>(begin, end, fill, a.x, a.old, a.target, a.dx);
}

}  // namespace

void ppo_policy_loss_fwd(const PpoLoss& a, int64_t begin, int64_t end) {
  WITH_ACC(a.acc, Acc, { for (; begin < end; ++begin) policy_fwd<Acc>(a, begin); })
}
void ppo_policy_loss_total(const PpoLoss& a) { WITH_ACC(a.acc, Acc, { policy_total<Acc>(a); }) }
void ppo_policy_loss_bwd(const PpoLoss& a, int64_t begin, int64_t end) {
  WITH_ACC(a.acc, Acc, { policy_bwd<Acc>(a, begin, end); })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
