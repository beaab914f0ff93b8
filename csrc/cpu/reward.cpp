#include "../reward.h"

#include <algorithm>

#include "dispatch.h"
#include "log.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

// ------------------------------------------------------------------------------------------------ focal ranking loss
// d = chosen - rejected, e = exp(-|d|): softplus(-d) = max(0, -d) + log(1 + e), sigmoid(-d) = e / (1 + e) for d > 0 and
// 1 / (1 + e) else; nothing cancels on either side.
template <typename Acc> struct Focal { Vec<Acc> softplus, s, q, weight; };  // q = 1 - s

template <bool kSquare, typename Acc> VEC_INLINE Focal<Acc> focal(Vec<Acc> d, Acc gamma) {
  using V = Vec<Acc>;
  const auto positive = less(V(0), d);
  const V a = magnitude(d), e = exp(V(0) - a), l = log1p_of_unit(e);
  const V large = V(1) / (V(1) + e), small = e * large;
  V weight;
  if constexpr (kSquare) {  // (2 s)^2
    weight = (small + small) * (small + small);
  } else {  // log(2 s) = ln 2 - d - log(1 + e); bounded, so that gamma = 0 gives 1 for any d
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

// dloss/dd = -weight (s + gamma (1 - s) softplus(-d)), the second term for d > 0 only.
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

// ---------------------------------------------------------------------------------------------------- log barrier
// Inside |x| <= edge the barrier itself; outside it goes on from the edge, where value and slope are exact in double.
struct Edge {
  double at, value, slope;
  Edge(double bound, double margin)
      : at(bound * (1 - margin)), value(-(std::log(at + bound) + std::log(bound - at))),
        slope(2 * at / ((bound - at) * (bound + at))) {}
};

template <typename Acc> void barrier_fwd(const LogBarrier& a, int64_t begin, int64_t end) {
  using V = Vec<Acc>;
  const Edge edge(a.bound, a.margin);
  const V at(static_cast<Acc>(edge.at)), bound(static_cast<Acc>(a.bound));
  const auto fill = [&](int64_t i, int64_t n, const Acc* rewards) VEC_LAMBDA {
    Acc* penalty = static_cast<Acc*>(a.penalty) + i;
    for_vectors<V, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
      const V x = load<V>(rewards + j, lanes), size = magnitude(x), near = min(at, size);  // NaN passes
      const V inside = V(0) - (log(bound + near) + log(bound - near));
      const V beyond = a.clamp ? V(static_cast<Acc>(edge.value))
                               : fma(V(static_cast<Acc>(edge.slope)), size - at, V(static_cast<Acc>(edge.value)));
      store(penalty + j, pick(less(at, size), beyond, inside), lanes);
    });
  };
  for_blocks<Acc>(begin, end, fill, a.rewards);
}

// 1 / (bound - x) - 1 / (bound + x) = 2 x / ((bound - x) (bound + x))
template <typename Acc> void barrier_bwd(const LogBarrier& a, int64_t begin, int64_t end) {
  using V = Vec<Acc>;
  const Edge edge(a.bound, a.margin);
  const V at(static_cast<Acc>(edge.at)), bound(static_cast<Acc>(a.bound));
  const V slope(static_cast<Acc>(a.clamp ? 0 : edge.slope));
  const auto fill = [&](int64_t i, int64_t n, const Acc* rewards, Acc* drewards) VEC_LAMBDA {
    const Acc* dpenalty = static_cast<const Acc*>(a.dpenalty) + i;
    for_vectors<V, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
      const V x = load<V>(rewards + j, lanes), near = min(at, max(V(0) - at, x));
      const V inside = (near + near) / ((bound - near) * (bound + near));
      const V beyond = pick(less(x, V(0)), V(0) - slope, slope);
      store(drewards + j, load<V>(dpenalty + j, lanes) * pick(less(at, magnitude(x)), beyond, inside), lanes);
    });
  };
  for_blocks<Acc>(begin, end, fill, a.rewards, a.drewards);
}

// ---------------------------------------------------------------------------------------------------- reward loss
int64_t row_of(const RewardLoss& a, int64_t sequence) {
  return a.cu_seqlens == nullptr ? sequence : int64_t{a.cu_seqlens[sequence + 1]} - 1;
}

template <typename T, typename W> void rewards_of(const RewardLoss& a, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  for (int64_t i = begin; i < end; ++i) {
    const T* row = static_cast<const T*>(a.hidden) + row_of(a, i) * a.row_stride;
    const auto* weight = static_cast<const W*>(a.weight);
    Two<V> sums[4];
    for_unrolled<4, V, T>(a.cols, [&](int64_t j, auto n, int u) VEC_LAMBDA {
      add_to(sums[u], load<V>(row + j, n), load<V>(weight + j, n));
    });
    const Two<V> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    static_cast<Acc*>(a.rewards)[i] = (sum.a + sum.b).sum();
  }
}

// A few sequences: the scalar library functions in double, rounded once.
template <typename Acc> void total(const RewardLoss& a) {
  const auto* rewards = static_cast<const Acc*>(a.rewards);
  auto* slopes = static_cast<Acc*>(a.slopes);
  const Edge edge(a.bound, a.margin);
  double ranking = 0, penalty = 0;
  const double pairs = static_cast<double>(a.n / 2), penalty_scale = a.n ? a.penalty_weight / static_cast<double>(a.n) : 0;
  double slope[2];
  for (int64_t i = 0; i < a.n; ++i) {
    const double x = static_cast<double>(rewards[i]), size = std::abs(x);
    const double room = (a.bound - x) * (a.bound + x);
    penalty += size > edge.at ? edge.value + edge.slope * (size - edge.at) : -std::log(room);
    slope[i % 2] = penalty_scale * (size > edge.at ? std::copysign(edge.slope, x) : 2 * x / room);
    if (i % 2 == 0) continue;
    const double d = static_cast<double>(rewards[i - 1]) - x, e = std::exp(-std::abs(d)), large = 1 / (1 + e);
    const double softplus = std::log1p(e) + std::max(0.0, -d), s = d > 0 ? e * large : large;
    const double weight = d > 0 ? (a.gamma == 2 ? 4 * s * s : std::pow(2 * s, a.gamma)) : 1;
    ranking += d != d ? d : weight * softplus;
    const double fall = weight * (s + (d > 0 ? a.gamma * large * softplus : 0)) / pairs;
    slopes[i - 1] = static_cast<Acc>(slope[0] - fall);
    slopes[i] = static_cast<Acc>(slope[1] + fall);
  }
  *static_cast<Acc*>(a.loss) = static_cast<Acc>(a.n ? ranking / pairs + penalty_scale * penalty : 0);
}

template <typename Acc> void drewards_total(const RewardLoss& a) {
  for (int64_t i = 0; i < a.n; ++i) {
    Acc sum = a.dloss ? *static_cast<const Acc*>(a.dloss) * static_cast<const Acc*>(a.slopes)[i] : Acc(0);
    if (a.drewards) sum += static_cast<const Acc*>(a.drewards)[i];
    static_cast<Acc*>(a.drewards_total)[i] = sum;
  }
}

template <typename T, typename W> void dhidden_of(const RewardLoss& a, int64_t begin, int64_t end) {
  using V = Vec<acc_t<T>>;
  const auto* weight = static_cast<const W*>(a.weight);
  auto* dhidden = static_cast<T*>(a.dhidden);
  int64_t i = begin;
  if (a.cu_seqlens != nullptr) {
    std::memset(dhidden + begin * a.cols, 0, sizeof(T) * static_cast<size_t>((end - begin) * a.cols));
    i = std::upper_bound(a.cu_seqlens + 1, a.cu_seqlens + a.n + 1, begin) - (a.cu_seqlens + 1);  // of token `begin`
  }
  for (; i < a.n && row_of(a, i) < end; ++i) {
    const V scale(static_cast<const acc_t<T>*>(a.drewards_total)[i]);
    T* row = dhidden + row_of(a, i) * a.cols;
    for_vectors<V, T>(a.cols, [&](int64_t j, auto n) VEC_LAMBDA { store(row + j, load<V>(weight + j, n) * scale, n); });
  }
}

// Sums over rows in two levels: one chain over half a million sequences would lose four digits of float32.
constexpr int64_t kChainRows = 512;

// Four rows at a time over a piece of the columns, whose sums stay in the first-level cache: rows are then read from end to
// end, as the prefetcher likes it, and a column's chain takes them in rising order all the same.
template <typename T, typename W> void dweight_of(const RewardLoss& a, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  constexpr int64_t kPiece = 1024;
  const auto* scales = static_cast<const Acc*>(a.drewards_total);
  auto* dweight = static_cast<W*>(a.dweight);
  alignas(64) Acc chain[kPiece], sums[kPiece];
  for (int64_t j = begin; j < end; j += kPiece) {
    const int64_t n = std::min(kPiece, end - j);
    const auto row = [&](int64_t i) { return static_cast<const T*>(a.hidden) + row_of(a, i) * a.row_stride + j; };
    std::memset(sums, 0, sizeof(sums));
    for (int64_t first = 0; first < a.n; first += kChainRows) {
      std::memset(chain, 0, sizeof(chain));
      const int64_t last = std::min(first + kChainRows, a.n);
      int64_t i = first;
      for (; i + 4 <= last; i += 4) {
        const T *row0 = row(i), *row1 = row(i + 1), *row2 = row(i + 2), *row3 = row(i + 3);
        const V scale0(scales[i]), scale1(scales[i + 1]), scale2(scales[i + 2]), scale3(scales[i + 3]);
        for_vectors<V, T>(n, [&](int64_t c, auto part) VEC_LAMBDA {
          auto sum = fma(load<V>(row0 + c, part), scale0, load_partial<V>(chain + c, part));
          sum = fma(load<V>(row1 + c, part), scale1, sum);
          sum = fma(load<V>(row2 + c, part), scale2, sum);
          store_partial(chain + c, fma(load<V>(row3 + c, part), scale3, sum), part);
        });
      }
      for (; i < last; ++i) {
        const T* one = row(i);
        for_vectors<V, T>(n, [&](int64_t c, auto part) VEC_LAMBDA {
          store_partial(chain + c, fma(load<V>(one + c, part), V(scales[i]), load_partial<V>(chain + c, part)), part);
        });
      }
      for_vectors<V, T>(n, [&](int64_t c, auto part) VEC_LAMBDA {
        store_partial(sums + c, load_partial<V>(sums + c, part) + load_partial<V>(chain + c, part), part);
      });
    }
    for_vectors<V, T>(n, [&](int64_t c, auto part) VEC_LAMBDA {
      store(dweight + j + c, load_partial<V>(sums + c, part), part);
    });
  }
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

void log_barrier_penalty_fwd(const LogBarrier& a, int64_t begin, int64_t end) {
  WITH_ACC(a.acc, Acc, { barrier_fwd<Acc>(a, begin, end); })
}

void log_barrier_penalty_bwd(const LogBarrier& a, int64_t begin, int64_t end) {
  WITH_ACC(a.acc, Acc, { barrier_bwd<Acc>(a, begin, end); })
}

#define WITH_WEIGHT(kernel)                                                    \
  WITH_STORAGE(a.dtype, T, {                                                   \
    if (a.weight_dtype == a.dtype) return kernel<T, T>(a, begin, end);         \
    if constexpr (sizeof(T) == 2) return kernel<T, float>(a, begin, end);      \
  })

void reward_loss_rewards(const RewardLoss& a, int64_t begin, int64_t end) { WITH_WEIGHT(rewards_of) }
void reward_loss_dhidden(const RewardLoss& a, int64_t begin, int64_t end) { WITH_WEIGHT(dhidden_of) }
void reward_loss_dweight(const RewardLoss& a, int64_t begin, int64_t end) { WITH_WEIGHT(dweight_of) }

void reward_loss_total(const RewardLoss& a) {
  WITH_ACC(a.dtype, Acc, { total<Acc>(a); })
}

void reward_loss_drewards(const RewardLoss& a) {
  WITH_ACC(a.dtype, Acc, { drewards_total<Acc>(a); })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
