// Generalized advantage estimation: the arguments that the binding passes to the kernels, as raw pointers. Formula:
// internlm2_kernels/ops/gae.py.
#pragma once
#include "types.h"

namespace internlm2 {

struct Gae {
  Dtype acc;  // f32 or f64: the type of bootstrap and of the results
  In rewards, values;
  const int32_t* cu_seqlens;  // [n + 1]
  const uint8_t* mask;        // [tokens], 0: the token is masked; null: none is
  const void* bootstrap;      // [n] the value after the last token of each sequence; null: 0
  void *advantages, *returns;
  double gamma, lam;
};

INTERNLM2_CPU_KERNELS(void gae_fwd(const Gae& a, int64_t first_sequence, int64_t last_sequence);)

}  // namespace internlm2
