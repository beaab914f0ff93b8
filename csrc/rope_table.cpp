#include "rope_table.h"

#include "threads.h"

namespace internlm2 {
namespace {

std::tuple<Tensor, Tensor> rope_table_fwd_cpp(const Tensor& positions, const Tensor& inv_freq, double divisor,
                                              double magnitude, bool float32_angles) {
  check_cpu();
  const int64_t rows = positions.size(0), half = inv_freq.size(0);
  const auto f32 = torch::headeronly::ScalarType::Float;
  Tensor cos = torch::stable::new_empty(inv_freq, {rows, half}, f32);
  Tensor sin = torch::stable::new_empty(inv_freq, {rows, half}, f32);
  const RopeTableFwd a{dtype_of(positions), cdata(positions), static_cast<const double*>(cdata(inv_freq)),
                       static_cast<float*>(data(cos)), static_cast<float*>(data(sin)), half, divisor, magnitude,
                       float32_angles};
  for_rows(rows, grain_of(1024, half), [&](int64_t b, int64_t e) { INTERNLM2_CPU(rope_table_fwd, a, b, e); });
  return {cos, sin};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) { INTERNLM2_IMPL(m, "rope_table_fwd.cpp", rope_table_fwd_cpp); }

}  // namespace internlm2
