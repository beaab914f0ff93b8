#include "../focal_ranking_loss.h"

#include "elementwise.h"
#include "simd/log.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

// The terms from which loss and gradient of a pair are computed, with d = chosen - rejected and e = exp(-|d|):
// softplus(-d) = max(0, -d) + log(1 + e), and s = sigmoid(-d), which is e / (1 + e) for d > 0 and 1 / (1 + e) otherwise.
// Nothing cancels for either sign. `weight` is (2 s)^gamma for d > 0 and 1 otherwise.
template <typename Acc> struct Focal { Vec<Acc> softplus, s, q, weight; };  // q = 1 - s

template <bool kSquare, typename Acc> VEC_INLINE Focal<Acc> focal(Vec<Acc> d, Acc gamma) {
  using V = Vec<Acc>;
  const auto positive = less(V(0), d);
  const V a = magnitude(d), e = exp(V(0) - a), l = log1p_of_unit(e);
  const V large = V(1) / (V(1) + e), small = e * large;
  V weight;
  if constexpr (kSquare) {  // (2 s)^2
    weight = (small + small) * (small + small);
  } else {  // (2 s)^gamma by log(2 s) = ln 2 - d - log(1 + e), bounded because 0 * -inf would be NaN
    weight = exp(V(gamma) * max(V(Acc(-1e30)), (V(Acc(0.6931471805599453)) - a) - l));
  }
  return {l + max(V(0), V(0) - d), pick(positive, small, large), pick(positive, large, small),
          pick(positive, weight, V(1))};
}

template <bool kSquare, typename Acc> void focal_fwd(const FocalRanking& a, int64_t begin, int64_t end) {
  using V = Vec<Acc>;
  const auto fill = [&](int64_t i, int64_t n, const Acc* chosen, const Acc* rejected) VEC_LAMBDA {
    Acc* loss = static_cast<Acc*>(a.loss) + i;
    for_vectors<V, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
      const auto f = focal<kSquare>(load<V>(chosen + j, lanes) - load<V>(rejected + j, lanes), static_cast<Acc>(a.gamma));
      store(loss + j, f.weight * f.softplus, lanes);
    });
  };
  for_blocks<Acc>(begin, end, fill, a.chosen, a.rejected);
}

// dloss/dd = -weight (s + gamma (1 - s) softplus(-d)), where the second term exists only for d > 0.
template <bool kSquare, typename Acc> void focal_bwd(const FocalRanking& a, int64_t begin, int64_t end) {
  using V = Vec<Acc>;
  const auto fill = [&](int64_t i, int64_t n, const Acc* chosen, const Acc* rejected, Acc* dchosen,
                        Acc* drejected) VEC_LAMBDA {
    const Acc* dloss = static_cast<const Acc*>(a.dloss) + i;
    for_vectors<V, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
      const V d = load<V>(chosen + j, lanes) - load<V>(rejected + j, lanes);
      const auto f = focal<kSquare>(d, static_cast<Acc>(a.gamma));
      const V through = only(less(V(0), d), V(static_cast<Acc>(a.gamma)) * f.q * f.softplus);
      const V fall = load<V>(dloss + j, lanes) * f.weight * (f.s + through);
      store(drejected + j, fall, lanes);
      store(dchosen + j, V(0) - fall, lanes);
    });
  };
  for_blocks<Acc>(begin, end, fill, a.chosen, a.rejected, a.dchosen, a.drejected);
}

}  // namespace

void focal_ranking_loss_fwd(const FocalRanking& a, int64_t begin, int64_t end) {
  WITH_ACC(a.acc, Acc, {
    a.gamma == 2 ? focal_fwd<true, Acc>(a, begin, end) : focal_fwd<false, Acc>(a, begin, end);
  })
}

void focal_ranking_loss_bwd(const FocalRanking& a, int64_t begin, int64_t end) {
  WITH_ACC(a.acc, Acc, {
    a.gamma == 2 ? focal_bwd<true, Acc>(a, begin, end) : focal_bwd<false, Acc>(a, begin, end);
  })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
