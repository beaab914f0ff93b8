#include "linear.h"

#include <algorithm>

#include "threads.h"

namespace internlm2 {
namespace {

constexpr int64_t kRowsAtOnce = 512;  // rows of the batch in a piece of the gradient of the weight
constexpr double kSerial = 1 << 20;  // multiplications below which more threads cost more than they save

LinearOperand operand(const Tensor& t, bool along) { return {dtype_of(t), cdata(t), t.stride(0), along}; }

// Computes a product whose operands, pieces and result are set in `a`.
void multiply(LinearProduct& a, const Tensor& like) {
  if (a.m == 0 || a.n == 0) return;
  a.capacity = a.m;
  const int64_t most = INTERNLM2_CPU_MATRIX(linear_sizes, a).rows;
  const int64_t chunks = (a.m + most - 1) / most;
  const int64_t chunk = std::min(a.m, ((a.m + chunks - 1) / chunks + 47) / 48 * 48);  // nearly equal
  a.capacity = chunk;
  const LinearSizes sizes = INTERNLM2_CPU_MATRIX(linear_sizes, a);
  const int64_t panels = (a.n + sizes.panel - 1) / sizes.panel;
  const bool serial = static_cast<double>(a.m) * a.n * a.k < kSerial;
  const int64_t workers = serial ? 1 : workers_for(std::max(panels, (chunk + kLinearPackRows - 1) / kLinearPackRows));
  const auto memory = [&](int64_t bytes) {
    return torch::stable::new_empty(like, {bytes + 64}, torch::headeronly::ScalarType::Char);
  };
  const auto aligned = [](const Tensor& t) {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(data(t)) + 63) / 64 * 64);
  };
  const Tensor packed = memory((chunk + 31) / 32 * 32 * sizes.row_bytes), scratch = memory(workers * sizes.scratch);
  a.a_packed = aligned(packed);
  for (a.first = 0; a.first < a.m; a.first += chunk) {
    a.rows = std::min(chunk, a.m - a.first);
    const int64_t tiles = (a.rows + kLinearPackRows - 1) / kLinearPackRows;
    if (sizes.row_bytes > 0) {
      for_tiles(tiles, std::min(workers, tiles), [&](int64_t tile, int64_t) { INTERNLM2_CPU_MATRIX(linear_pack, a, tile); });
    }
    for_tiles(panels, std::min(workers, panels), [&](int64_t tile, int64_t worker) {
      INTERNLM2_CPU_MATRIX(linear_tile, a, tile, aligned(scratch) + worker * sizes.scratch);
    });
  }
}

void set_result(LinearProduct& a, const Tensor& out) {
  a.out_dtype = dtype_of(out);
  a.out = data(out);
  a.out_stride = a.n;
}

Tensor linear_fwd_cpp(const Tensor& x, const Tensor& weight, const OptTensor& bias, const OptTensor& residual, int64_t pieces,
                      bool wide) {
  check_cpu();
  LinearProduct a{};
  a.dtype = dtype_of(x);
  a.a = operand(x, true);
  a.b = operand(weight, true);
  a.m = x.size(0);
  a.k = x.size(1);
  a.n = weight.size(0);
  a.piece = linear_piece(a.k, pieces);
  a.tree = true;
  const Tensor y = torch::stable::new_empty(x, {a.m, a.n}, wide ? accumulator_of(x) : x.scalar_type());
  set_result(a, y);
  if (bias) {
    a.bias = cdata(*bias);
    a.bias_dtype = dtype_of(*bias);
  }
  if (residual) {
    a.residual = cdata(*residual);
    a.residual_stride = residual->stride(0);
  }
  multiply(a, x);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd_cpp(const Tensor& dy, const OptTensor& x, const OptTensor& weight, int64_t pieces,
                                                  bool wide, bool needs_dbias) {
  check_cpu();
  const int64_t rows = dy.size(0), cols = dy.size(1);
  const auto fresh = [&](std::initializer_list<int64_t> sizes, bool acc) {
    return torch::stable::new_empty(dy, {sizes.begin(), sizes.size()}, acc ? accumulator_of(dy) : dy.scalar_type());
  };
  const Tensor dx = weight ? fresh({rows, weight->size(1)}, false) : fresh({0}, false);
  const Tensor dweight = x ? fresh({cols, x->size(1)}, wide) : fresh({0}, false);
  const Tensor dbias = fresh({needs_dbias ? cols : 0}, true);
  LinearProduct a{};
  a.dtype = dtype_of(dy);
  if (weight) {  // dx = dy weight
    a.a = operand(dy, true);
    a.b = operand(*weight, false);
    a.m = rows;
    a.n = weight->size(1);
    a.k = cols;
    a.piece = linear_piece(a.k, pieces);
    a.tree = true;
    set_result(a, dx);
    multiply(a, dy);
  }
  if (x) {  // dweight = dy^T x
    a.a = operand(dy, false);
    a.b = operand(*x, false);
    a.m = cols;
    a.n = x->size(1);
    a.k = rows;
    a.piece = kRowsAtOnce;
    a.tree = false;
    set_result(a, dweight);
    multiply(a, dy);
  }
  if (needs_dbias) {
    const LinearBias b{a.dtype, cdata(dy), data(dbias), rows, cols, dy.stride(0)};
    for_rows(cols, grain_of(16384, rows), [&](int64_t begin, int64_t end) { INTERNLM2_CPU(linear_dbias, b, begin, end); });
  }
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "linear_fwd.cpp", linear_fwd_cpp);
  INTERNLM2_IMPL(m, "linear_bwd.cpp", linear_bwd_cpp);
}

}  // namespace internlm2
