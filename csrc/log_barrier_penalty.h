// Log-barrier penalty of rewards: the arguments that the binding passes to the kernels, as raw pointers.
// Formula: internlm2_kernels/ops/log_barrier_penalty.py.
#pragma once
#include "types.h"

namespace internlm2 {

struct LogBarrier {
  Dtype acc;  // f32 or f64: the type of dpenalty and penalty, in which everything is computed
  In rewards;
  const void* dpenalty;  // [n] the upstream gradient, read by the backward
  void* penalty;         // [n]
  Out drewards;
  double bound, margin;
  bool clamp;
};

INTERNLM2_CPU_KERNELS(
  void log_barrier_penalty_fwd(const LogBarrier& a, int64_t begin, int64_t end);
  void log_barrier_penalty_bwd(const LogBarrier& a, int64_t begin, int64_t end);)

}  // namespace internlm2
