// Shared by the kernels of PPO's policy and value losses: the results from sums, and the factor of every entry's gradient.
#pragma once
#include "../ppo_loss.h"
#include "elementwise.h"
#include "simd/log.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr double kInfinity = __builtin_huge_val();

// sum / count, or 0 where count is 0.
inline double over(double sum, double count) { return count > 0 ? sum / count : 0; }

template <typename Acc> void put_results(const PpoLoss& a, double loss, double clipped, double statistic, double count) {
  *static_cast<Acc*>(a.loss) = static_cast<Acc>(over(loss, count));
  *static_cast<Acc*>(a.clip_fraction) = static_cast<Acc>(over(clipped, count));
  *static_cast<Acc*>(a.statistic) = static_cast<Acc>(statistic);
  *static_cast<Acc*>(a.count) = static_cast<Acc>(count);
}

// The upstream gradient divided by the number of unmasked entries, or 0 where there are none.
template <typename Acc> Acc upstream(const PpoLoss& a) {
  const Acc count = *static_cast<const Acc*>(a.count);
  return count > 0 ? *static_cast<const Acc*>(a.dloss) / count : Acc(0);
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
