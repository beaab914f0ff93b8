// The edge of the log barrier, which log_barrier_penalty and reward_loss share.
#pragma once
#include <cmath>

#include "simd/vec.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

// Where |x| is at most `at` the penalty is the barrier itself. Beyond, it continues from its value and slope there, which are
// computed in double. The distance to the bound is `margin`, because the difference bound - at would be rounded.
struct Edge {
  double at, value, slope;
  Edge(double bound, double margin)
      : at(bound - margin), value(-(std::log(bound + at) + std::log(margin))), slope(1 / margin - 1 / (bound + at)) {}
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
