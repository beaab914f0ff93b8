#include "squared_norm.h"

#include "tensor_list.h"

namespace internlm2 {
namespace {

Tensor squared_norm_fwd_cpp(const Tensors& tensors) {
  check_cpu();
  INTERNLM2_CHECK_VALUE(!tensors.empty(), "squared_norm", "tensors", "at least one tensor, got none");
  Chunks chunks;
  std::vector<In> ins;
  bool wide = false;
  for (const Tensor& tensor : tensors) {
    check_dense("squared_norm", "tensors", tensor, ins.size());
    ins.push_back(in_of(tensor));
    chunks.add(tensor.numel());
    wide = wide || ins.back().dtype == Dtype::f64;
  }
  const auto f64 = torch::headeronly::ScalarType::Double, f32 = torch::headeronly::ScalarType::Float;
  Tensor total = torch::stable::new_empty(tensors[0], {}, wide ? f64 : f32);
  Tensor partial = torch::stable::new_empty(tensors[0], {chunks.count()}, f64);
  auto* sums = static_cast<double*>(data(partial));
  chunks.run([&](int64_t chunk, size_t i, int64_t begin) {
    sums[chunk] = INTERNLM2_CPU(sum_of_squares, ins[i], begin, std::min(begin + kListChunk, tensors[i].numel()));
  });
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks.count(); ++chunk) sum += sums[chunk];
  if (wide) *static_cast<double*>(data(total)) = sum;
  else *static_cast<float*>(data(total)) = static_cast<float>(sum);
  return total;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) { INTERNLM2_IMPL(m, "squared_norm_fwd.cpp", squared_norm_fwd_cpp); }

}  // namespace internlm2
