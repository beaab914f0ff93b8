// Fills the arguments of the rotary embedding's kernels (rope_angles.h) from tensors.
#pragma once
#include "checks.h"
#include "rope_angles.h"

namespace internlm2 {

// Raises an error of operator `op` for positions outside the tables. With op = nullptr nothing is checked here, because
// positions are on a GPU, where the kernel checks them.
inline RopeAngles angles_of(const char* op, const Tensor& cos, const Tensor& sin, const OptTensor& positions) {
  RopeAngles a{dtype_of(cos), Dtype::i64, cdata(cos), cdata(sin), nullptr, cos.size(0), cos.size(1)};
  if (positions.has_value()) {
    a.positions_dtype = dtype_of(*positions);
    a.positions = cdata(*positions);
    if (op != nullptr) check_range(op, "positions", *positions, 0, a.length);
  }
  return a;
}

inline Heads heads_of(const Tensor& t) { return {cdata(t), t.size(1), t.stride(0), t.stride(1)}; }

}  // namespace internlm2
