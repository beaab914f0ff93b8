#include "rms_norm.h"

#include <algorithm>

#include "stable.h"

namespace internlm2 {
namespace {

constexpr int64_t kChunks = 64;  // partial sums of dweight: a function of the number of rows alone, hence deterministic

int64_t grain(int64_t cols) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(cols, 1)); }

Tensor new_rstd(const Tensor& x) {
  const auto sizes = x.sizes();
  return torch::stable::new_empty(x, {sizes.data(), sizes.size() - 1}, accumulator_of(x));
}

RmsNormFwd forward_args(const Tensor& x, const Tensor* residual, const Tensor& weight, const Tensor& y, const Tensor* h,
                        const Tensor& rstd, double eps, bool hf) {
  RmsNormFwd a{};
  a.dtype = dtype_of(x);
  a.weight_dtype = dtype_of(weight);
  a.x_rows = rows_of(x);
  a.x = cdata(x);
  if (residual != nullptr) {
    a.residual_rows = rows_of(*residual);
    a.residual = cdata(*residual);
    a.h = data(*h);
  }
  a.weight = cdata(weight);
  a.y = data(y);
  a.rstd = data(rstd);
  a.cols = x.size(x.dim() - 1);
  a.eps = eps;
  a.hf = hf;
  return a;
}

void run_forward_cpu(const RmsNormFwd& a) {
  check_cpu();
  for_rows(a.x_rows.count(), grain(a.cols), [&](int64_t b, int64_t e) { INTERNLM2_CPU(rms_norm_fwd, a, b, e); });
}

std::tuple<Tensor, Tensor> rms_norm_fwd_cpp(const Tensor& x, const Tensor& weight, double eps, bool hf) {
  Tensor y = empty_as(x), rstd = new_rstd(x);
  run_forward_cpu(forward_args(x, nullptr, weight, y, nullptr, rstd, eps, hf));
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_add_fwd_cpp(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                        double eps, bool hf) {
  Tensor y = empty_as(x), h = empty_as(x), rstd = new_rstd(x);
  run_forward_cpu(forward_args(x, &residual, weight, y, &h, rstd, eps, hf));
  return {y, h, rstd};
}

// Everything but the sums of dweight.
RmsNormBwd backward_args(const Tensor& dy, const OptTensor& dresidual, const Tensor& h, const Tensor& weight,
                         const Tensor& rstd, const Tensor& dx, bool hf) {
  RmsNormBwd a{};
  a.dtype = dtype_of(h);
  a.weight_dtype = dtype_of(weight);
  a.dy_rows = rows_of(dy);
  a.h_rows = rows_of(h);
  a.dy = cdata(dy);
  if (dresidual.has_value()) {
    a.dresidual_rows = rows_of(*dresidual);
    a.dresidual = cdata(*dresidual);
  }
  a.h = cdata(h);
  a.weight = cdata(weight);
  a.rstd = cdata(rstd);
  a.dx = data(dx);
  a.cols = weight.size(0);
  a.hf = hf;
  return a;
}

std::tuple<Tensor, Tensor> rms_norm_bwd_cpp(const Tensor& dy, const OptTensor& dresidual, const Tensor& h,
                                            const Tensor& weight, const Tensor& rstd, bool hf, bool needs_dweight) {
  check_cpu();
  const int64_t cols = weight.size(0), rows = rows_of(h).count();
  Tensor dx = empty_as(h);
  Tensor dweight = torch::stable::new_empty(weight, {needs_dweight ? cols : 0});
  RmsNormBwd a = backward_args(dy, dresidual, h, weight, rstd, dx, hf);
  a.rows_per_chunk = std::max<int64_t>(1, (rows + kChunks - 1) / kChunks);
  const int64_t chunks = (rows + a.rows_per_chunk - 1) / a.rows_per_chunk;
  Tensor partial = torch::stable::new_empty(rstd, {needs_dweight ? chunks : 0, cols});
  if (needs_dweight) {
    a.dweight = data(dweight);
    a.partial = data(partial);
  }
  for_rows(chunks, std::max<int64_t>(1, grain(cols) / a.rows_per_chunk),
           [&](int64_t b, int64_t e) { INTERNLM2_CPU(rms_norm_bwd, a, b, e); });
  if (needs_dweight) {
    for_rows((cols + kDweightColumns - 1) / kDweightColumns,
             std::max<int64_t>(1, 16384 / (std::max<int64_t>(chunks, 1) * kDweightColumns)),
             [&](int64_t b, int64_t e) { INTERNLM2_CPU(rms_norm_bwd_dweight, a, chunks, b, e); });
  }
  return {dx, dweight};
}

#ifdef INTERNLM2_CUDA
std::tuple<Tensor, Tensor> rms_norm_fwd_cuda(const Tensor& x, const Tensor& weight, double eps, bool hf) {
  check_cuda_dtype(x);
  const CudaScope scope(x);
  Tensor y = empty_as(x), rstd = new_rstd(x);
  check_launch(cuda::rms_norm_fwd(forward_args(x, nullptr, weight, y, nullptr, rstd, eps, hf), scope.stream()));
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_add_fwd_cuda(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                         double eps, bool hf) {
  check_cuda_dtype(x);
  const CudaScope scope(x);
  Tensor y = empty_as(x), h = empty_as(x), rstd = new_rstd(x);
  check_launch(cuda::rms_norm_fwd(forward_args(x, &residual, weight, y, &h, rstd, eps, hf), scope.stream()));
  return {y, h, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd_cuda(const Tensor& dy, const OptTensor& dresidual, const Tensor& h,
                                             const Tensor& weight, const Tensor& rstd, bool hf, bool needs_dweight) {
  check_cuda_dtype(h);
  const CudaScope scope(h);
  const int64_t cols = weight.size(0), rows = rows_of(h).count();
  Tensor dx = empty_as(h);
  Tensor dweight = torch::stable::new_empty(weight, {needs_dweight ? cols : 0});
  RmsNormBwd a = backward_args(dy, dresidual, h, weight, rstd, dx, hf);
  a.rows_per_chunk = cuda::rms_norm_bwd_rows_per_chunk(a.dtype, rows, cols);
  const int64_t chunks = (rows + a.rows_per_chunk - 1) / a.rows_per_chunk;
  Tensor partial = torch::stable::new_empty(rstd, {needs_dweight ? chunks : 0, cols});
  if (needs_dweight) {
    a.dweight = data(dweight);
    a.partial = data(partial);
  }
  check_launch(cuda::rms_norm_bwd(a, chunks, scope.stream()));
  return {dx, dweight};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "rms_norm_fwd.cpp", rms_norm_fwd_cpp);
  INTERNLM2_IMPL(m, "rms_norm_add_fwd.cpp", rms_norm_add_fwd_cpp);
  INTERNLM2_IMPL(m, "rms_norm_bwd.cpp", rms_norm_bwd_cpp);
}

#ifdef INTERNLM2_CUDA
STABLE_TORCH_LIBRARY_IMPL(internlm2, CUDA, m) {
  INTERNLM2_IMPL(m, "rms_norm_fwd.cuda", rms_norm_fwd_cuda);
  INTERNLM2_IMPL(m, "rms_norm_add_fwd.cuda", rms_norm_add_fwd_cuda);
  INTERNLM2_IMPL(m, "rms_norm_bwd.cuda", rms_norm_bwd_cuda);
}
#endif

}  // namespace internlm2
