// Sum of the squares of a list of tensors: the arguments that the binding passes to the kernels, as raw pointers.
// Formula: internlm2_kernels/ops/squared_norm.py.
#pragma once
#include "types.h"

namespace internlm2 {

INTERNLM2_CPU_KERNELS(double sum_of_squares(const In& tensor, int64_t begin, int64_t end);)

}  // namespace internlm2
