// Generalized advantage estimation: the raw-pointer contract between binding and kernel. Formula: internlm2_kernels/ops/.
#pragma once
#include "types.h"

namespace internlm2 {

struct Gae {
  Dtype acc;  // f32 or f64: the type of bootstrap and of the results
  In rewards, values;
  const int32_t* cu_seqlens;  // [n + 1]
  const uint8_t* mask;        // null: everything counts
  const void* bootstrap;      // [n], null: 0
  void *advantages, *returns;
  double gamma, lam;
};

#define INTERNLM2_GAE_CPU void gae_fwd(const Gae& a, int64_t begin, int64_t end); /* sequences */

namespace cpu {
namespace AVX2 { INTERNLM2_GAE_CPU }
namespace AVX512 { INTERNLM2_GAE_CPU }
}  // namespace cpu

}  // namespace internlm2
