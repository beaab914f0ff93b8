#include "../reward_loss.h"

#include <algorithm>

#include "dispatch.h"
#include "log_barrier.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

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

// Loss and slopes from the rewards. There are few sequences, so it calls scalar library functions in double and rounds once.
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
    i = std::upper_bound(a.cu_seqlens + 1, a.cu_seqlens + a.n + 1, begin) - (a.cu_seqlens + 1);  // sequence of token `begin`
  }
  for (; i < a.n && row_of(a, i) < end; ++i) {
    const V scale(static_cast<const acc_t<T>*>(a.drewards_total)[i]);
    T* row = dhidden + row_of(a, i) * a.cols;
    for_vectors<V, T>(a.cols, [&](int64_t j, auto n) VEC_LAMBDA { store(row + j, load<V>(weight + j, n) * scale, n); });
  }
}

// Sums over rows are block-wise: a chain adds this many rows, and the chains are added up. A single float32 chain over half a
// million sequences would lose four digits.
constexpr int64_t kChainRows = 512;

// Takes kPiece columns, whose sums stay in the first-level cache, and goes along four rows at a time, so that the hardware
// prefetcher can follow each row. The chain of a column still adds the rows in rising order.
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
