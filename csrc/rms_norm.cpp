#include "rms_norm.h"

#include "threads.h"

namespace internlm2 {
namespace {

constexpr int64_t kChunks = 64;  // the most partial sums of dweight; a fixed number, so that no bit depends on the threads

int64_t grain(int64_t cols) { return grain_of(32768, cols); }

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

struct Forward {
  Tensor y;
  OptTensor h;  // x + residual, only where there is a residual
  Tensor rstd;
};

// Allocates the results and calls run(arguments), which writes them.
template <typename Run>
Forward forward(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, bool hf, const Run& run) {
  const auto sizes = x.sizes();
  Forward out{empty_as(x), std::nullopt, torch::stable::new_empty(x, {sizes.data(), sizes.size() - 1}, accumulator_of(x))};
  RmsNormFwd a{};
  a.dtype = dtype_of(x);
  a.weight_dtype = dtype_of(weight);
  a.x_rows = rows_of(x);
  a.x = cdata(x);
  if (residual != nullptr) {
    a.residual_rows = rows_of(*residual);
    a.residual = cdata(*residual);
    out.h.emplace(empty_as(x));
    a.h = data(*out.h);
  }
  a.weight = cdata(weight);
  a.y = data(out.y);
  a.rstd = data(out.rstd);
  a.cols = x.size(x.dim() - 1);
  a.eps = eps;
  a.hf = hf;
  run(a);
  return out;
}

// Allocates dx, dweight and the partial sums of dweight, and calls run(arguments, chunks), which writes them.
template <typename Run>
Pair backward(const Tensor& dy, const OptTensor& dresidual, const Tensor& h, const Tensor& weight, const Tensor& rstd,
                   bool hf, bool needs_dweight, int64_t rows_per_chunk, const Run& run) {
  const int64_t cols = weight.size(0);
  Tensor dx = empty_as(h), dweight = torch::stable::new_empty(weight, {needs_dweight ? cols : 0});
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
  a.cols = cols;
  a.hf = hf;
  a.rows_per_chunk = rows_per_chunk;
  const int64_t chunks = (a.h_rows.count() + rows_per_chunk - 1) / rows_per_chunk;
  Tensor partial = torch::stable::new_empty(rstd, {needs_dweight ? chunks : 0, cols});
  if (needs_dweight) {
    a.dweight = data(dweight);
    a.partial = data(partial);
  }
  run(a, chunks);
  return {dx, dweight};
}

Forward forward_cpu(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, bool hf) {
  check_cpu();
  return forward(x, residual, weight, eps, hf, [](const RmsNormFwd& a) {
    for_rows(a.x_rows.count(), grain(a.cols), [&](int64_t b, int64_t e) { INTERNLM2_CPU(rms_norm_fwd, a, b, e); });
  });
}

Pair rms_norm_fwd_cpp(const Tensor& x, const Tensor& weight, double eps, bool hf) {
  const auto [y, h, rstd] = forward_cpu(x, nullptr, weight, eps, hf);
  return {y, rstd};
}

Triple rms_norm_add_fwd_cpp(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, bool hf) {
  const auto [y, h, rstd] = forward_cpu(x, &residual, weight, eps, hf);
  return {y, *h, rstd};
}

Pair rms_norm_bwd_cpp(const Tensor& dy, const OptTensor& dresidual, const Tensor& h, const Tensor& weight,
                           const Tensor& rstd, bool hf, bool needs_dweight) {
  check_cpu();
  const int64_t cols = weight.size(0), rows_per_chunk = std::max<int64_t>(1, (rows_of(h).count() + kChunks - 1) / kChunks);
  return backward(dy, dresidual, h, weight, rstd, hf, needs_dweight, rows_per_chunk, [&](const RmsNormBwd& a, int64_t chunks) {
    for_rows(chunks, std::max<int64_t>(1, grain(cols) / rows_per_chunk),
             [&](int64_t b, int64_t e) { INTERNLM2_CPU(rms_norm_bwd, a, b, e); });
    if (!needs_dweight) return;
    for_rows((cols + kDweightColumns - 1) / kDweightColumns, grain_of(16384 / kDweightColumns, chunks),
             [&](int64_t b, int64_t e) {
               INTERNLM2_CPU(rms_norm_bwd_dweight, a, chunks, b * kDweightColumns, std::min(e * kDweightColumns, cols));
             });
  });
}

#ifdef INTERNLM2_CUDA
Forward forward_cuda(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, bool hf) {
  check_cuda_dtype(x);
  const CudaScope scope(x);
  return forward(x, residual, weight, eps, hf,
                 [&](const RmsNormFwd& a) { check_launch(cuda::rms_norm_fwd(a, scope.stream())); });
}

Pair rms_norm_fwd_cuda(const Tensor& x, const Tensor& weight, double eps, bool hf) {
  const auto [y, h, rstd] = forward_cuda(x, nullptr, weight, eps, hf);
  return {y, rstd};
}

Triple rms_norm_add_fwd_cuda(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, bool hf) {
  const auto [y, h, rstd] = forward_cuda(x, &residual, weight, eps, hf);
  return {y, *h, rstd};
}

Pair rms_norm_bwd_cuda(const Tensor& dy, const OptTensor& dresidual, const Tensor& h, const Tensor& weight,
                            const Tensor& rstd, bool hf, bool needs_dweight) {
  check_cuda_dtype(h);
  const CudaScope scope(h);
  const int64_t rows_per_chunk = cuda::rms_norm_bwd_rows_per_chunk(dtype_of(h), rows_of(h).count(), weight.size(0));
  return backward(dy, dresidual, h, weight, rstd, hf, needs_dweight, rows_per_chunk, [&](const RmsNormBwd& a, int64_t chunks) {
    check_launch(cuda::rms_norm_bwd(a, chunks, scope.stream()));
  });
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
