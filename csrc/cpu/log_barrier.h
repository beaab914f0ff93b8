// The edge of the log barrier, which log_barrier_penalty and reward_loss share.
#pragma once
#include <cmath>

#include "simd/vec.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

// Where |x| is at most `at` the penalty is the barrier itself. Beyond, it goes on from the edge, whose value and slope are
// computed in double.
struct Edge {
  double at, value, slope;
  Edge(double bound, double margin)
      : at(bound * (1 - margin)), value(-(std::log(at + bound) + std::log(bound - at))),
        slope(2 * at / ((bound - at) * (bound + at))) {}
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
