#include "flash_attention.h"

#include <algorithm>
#include <vector>

#include "attention_args.h"

namespace internlm2 {
namespace {

// All units of a call, those that see the most keys first, so that the threads end together.
std::vector<FlashUnit> units_of(const Attention& a, int64_t rows) {
  std::vector<std::pair<int64_t, FlashUnit>> all;
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t length = a.length_q(s);
    for (int64_t begin = 0; begin < length; begin += rows) {
      const int64_t end = std::min(begin + rows, length), keys = a.last_key(s, end - 1) - a.first_key(s, begin);
      for (int64_t g = 0; g < a.kv_heads; ++g) all.push_back({keys * (end - begin), {s, g, begin, end}});
    }
  }
  std::stable_sort(all.begin(), all.end(), [](const auto& x, const auto& y) { return x.first > y.first; });
  std::vector<FlashUnit> units;
  units.reserve(all.size());
  for (const auto& one : all) units.push_back(one.second);
  return units;
}

std::tuple<Tensor, Tensor> flash_attention_fwd_cpp(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_q,
                                                   const OptTensor& cu_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                   int64_t window_left, int64_t window_right, double scale, double softcap) {
  check_cpu();
  FlashFwd a{};
  fill_attention(a, q, k, v, cu_q, cu_k, max_seqlen_q, max_seqlen_k, window_left, window_right, scale, softcap);
  Tensor out = empty_as(q);
  std::vector<int64_t> lse_sizes{a.heads, a.seqlen_q};
  if (!cu_q.has_value()) lse_sizes.insert(lse_sizes.begin(), a.sequences);
  Tensor lse = torch::stable::new_empty(q, lse_sizes, accumulator_of(q));
  a.out = attention_tensor(out);
  a.lse = data(lse);
  const std::vector<FlashUnit> units = units_of(a, INTERNLM2_CPU_MATRIX(flash_attention_fwd_rows, a));
  const int64_t n = static_cast<int64_t>(units.size()), workers = workers_for(n);
  const int64_t bytes = INTERNLM2_CPU_MATRIX(flash_attention_fwd_scratch, a);
  Tensor scratch = torch::stable::new_empty(q, {workers * bytes}, torch::headeronly::ScalarType::Char);
  for_units(n, workers, [&](int64_t unit, int64_t worker) {
    INTERNLM2_CPU_MATRIX(flash_attention_fwd, a, units[unit], static_cast<char*>(data(scratch)) + worker * bytes);
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) { INTERNLM2_IMPL(m, "flash_attention_fwd.cpp", flash_attention_fwd_cpp); }

}  // namespace internlm2
