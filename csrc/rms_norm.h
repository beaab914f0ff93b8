// RMS normalization: the arguments that the binding passes to the kernels, as raw pointers. Formulas:
// internlm2_kernels/ops/rms_norm.py.
#pragma once
#include "types.h"

namespace internlm2 {

struct RmsNormFwd {
  Dtype dtype, weight_dtype;  // weight: dtype or f32
  Rows x_rows, residual_rows;
  const void* x;
  const void* residual;  // h = x + residual; null: h is x and is not written
  const void* weight;
  void *y, *h;  // contiguous [rows, cols]
  void* rstd;   // [rows] float (double for f64)
  int64_t cols;
  double eps;
  bool hf;  // round h * rstd to dtype before multiplying with weight
};

struct RmsNormBwd {
  Dtype dtype, weight_dtype;
  Rows dy_rows, dresidual_rows, h_rows;
  const void *dy, *dresidual, *h, *weight, *rstd;  // dresidual may be null
  void* dx;                                        // contiguous [rows, cols]
  void* dweight;                                   // null: the gradient of weight is not needed
  void* partial;                                   // [chunks, cols] float or double, where dweight is needed
  int64_t cols, rows_per_chunk;                    // chunk c sums dweight over rows_per_chunk rows from c * rows_per_chunk on
  bool hf;
};

constexpr int64_t kDweightColumns = 64;  // rms_norm_bwd_dweight takes columns in multiples of this: whole pairs of vectors

INTERNLM2_CPU_KERNELS(
  void rms_norm_fwd(const RmsNormFwd& a, int64_t first_row, int64_t last_row);
  void rms_norm_bwd(const RmsNormBwd& a, int64_t first_chunk, int64_t last_chunk);
  void rms_norm_bwd_dweight(const RmsNormBwd& a, int64_t chunks, int64_t first_column, int64_t last_column);)

namespace cuda {  // no f64; the launchers return the error of the launch, or null
const char* rms_norm_fwd(const RmsNormFwd& a, void* stream);
int64_t rms_norm_bwd_rows_per_chunk(Dtype dtype, int64_t rows, int64_t cols);
const char* rms_norm_bwd(const RmsNormBwd& a, int64_t chunks, void* stream);
}  // namespace cuda

}  // namespace internlm2
