#include "swiglu.h"

#include "threads.h"

namespace internlm2 {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it saves

// Where all tensors are contiguous, each is treated as one long row, so that short rows cost no more than long ones.
bool dense(const Rows& r, int64_t cols) { return r.inner == 1 && (r.outer_stride == cols || r.outer <= 1); }
void flatten(Rows& r) { r = {1, 1, 0, 0}; }

Tensor swiglu_fwd_cpp(const Tensor& gate, const Tensor& up) {
  check_cpu();
  Tensor y = empty_as(gate);
  SwigluFwd a{dtype_of(gate), rows_of(gate), rows_of(up), cdata(gate), cdata(up), data(y), gate.size(gate.dim() - 1)};
  const int64_t total = a.gate_rows.count() * a.cols;
  if (dense(a.gate_rows, a.cols) && dense(a.up_rows, a.cols)) {
    flatten(a.gate_rows);
    flatten(a.up_rows);
    a.cols = total;
  }
  for_rows(total, kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(swiglu_fwd, a, b, e); });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_bwd_cpp(const Tensor& dy, const Tensor& gate, const Tensor& up, bool packed) {
  check_cpu();
  const int64_t cols = gate.size(gate.dim() - 1);
  SwigluBwd a{dtype_of(gate), rows_of(dy), rows_of(gate), rows_of(up), cdata(dy), cdata(gate), cdata(up)};
  std::vector<int64_t> sizes(gate.sizes().begin(), gate.sizes().end());
  if (packed) sizes.back() *= 2;
  Tensor dgate = torch::stable::new_empty(gate, sizes);
  Tensor dup = packed ? torch::stable::new_empty(gate, {0}) : empty_as(gate);
  a.dgate = data(dgate);
  a.dup = packed ? static_cast<char*>(a.dgate) + cols * gate.element_size() : data(dup);
  a.out_stride = packed ? 2 * cols : cols;
  a.cols = cols;
  const int64_t total = a.gate_rows.count() * cols;
  if (!packed && dense(a.dy_rows, cols) && dense(a.gate_rows, cols) && dense(a.up_rows, cols)) {
    flatten(a.dy_rows);
    flatten(a.gate_rows);
    flatten(a.up_rows);
    a.out_stride = a.cols = total;
  }
  for_rows(total, kGrain, [&](int64_t b, int64_t e) { INTERNLM2_CPU(swiglu_bwd, a, b, e); });
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "swiglu_fwd.cpp", swiglu_fwd_cpp);
  INTERNLM2_IMPL(m, "swiglu_bwd.cpp", swiglu_bwd_cpp);
}

}  // namespace internlm2
