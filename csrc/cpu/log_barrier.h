// The edge of the log barrier -(log(bound + x) + log(bound - x)), shared by log_barrier_penalty and reward_loss.
#pragma once
#include <cmath>

#include "simd/vec.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

// Where |x| is at most at = bound - margin, the penalty is the barrier itself. Beyond, it goes on as a straight line (or a
// constant) from the barrier's `value` and `slope` at that point. The distance from `at` to the bound is taken as `margin`,
// which is exact, where bound - at would be rounded.
struct Edge {
  double at, value, slope;
  Edge(double bound, double margin)
      : at(bound - margin), value(-(std::log(bound + at) + std::log(margin))), slope(1 / margin - 1 / (bound + at)) {}
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
