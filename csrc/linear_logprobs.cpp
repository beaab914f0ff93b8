#include <cmath>

#include "linear_head_call.h"

namespace internlm2 {
namespace {

// A HeadCall over the shard of the vocabulary that begins at vocab_start. The label of a token may belong to another shard.
class TokenCall : public HeadCall {
 public:
  TokenCall(const Tensor& hidden, const Tensor& weight, const Tensor& tokens, double inv_temperature, double softcap,
            int64_t vocab_start, int64_t vocab_size, HeadStore store)
      : HeadCall(hidden, weight, inv_temperature, softcap, store), label_(static_cast<int64_t*>(take(this->tokens() * 8))) {
    read_labels("linear_logprobs", "tokens", tokens, vocab_size, nullptr, vocab_start, a.vocab, label_);
  }
  void at(int64_t first) { a.label = label_ + first; }
  void* moved(const Tensor& t, int64_t first) const { return static_cast<char*>(data(t)) + first * acc_size(); }
  int64_t column(int64_t t) const { return label_[t]; }  // the label's column in this shard; -1: it belongs to another shard

 private:
  int64_t* label_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_logprobs_fwd_cpp(
    const Tensor& hidden, const Tensor& weight, const Tensor& tokens, double inv_temperature, double softcap,
    int64_t vocab_start, int64_t vocab_size, bool needs_entropy, bool needs_sum, bool needs_hits) {
  check_cpu();
  TokenCall call(hidden, weight, tokens, inv_temperature, softcap, vocab_start, vocab_size, HeadStore::none);
  call.prepare();
  LinearHead& a = call.a;
  const int64_t n = call.tokens();
  Tensor logprobs = call.numbers({n}), lse = call.numbers({n, 2});
  Tensor entropy = call.numbers({needs_entropy ? n : 0}), sum = call.numbers({needs_sum ? n : 0});
  Tensor hits = torch::stable::new_empty(hidden, {needs_hits ? n : 0}, torch::headeronly::ScalarType::Bool);
  if (needs_entropy) a.block_dot = call.statistic(call.acc_size());
  if (needs_sum) a.block_total = call.statistic(call.acc_size());
  if (needs_hits) {
    a.block_best = static_cast<int32_t*>(call.statistic(4));
    a.best = call.row_numbers();
    a.best_column = static_cast<int32_t*>(call.take(a.capacity * 4));
  }
  const Numbers to(logprobs), lses(lse), logits(a.label_logit, call.wide());
  auto* hit = static_cast<bool*>(data(hits));
  call.run(
      [&](int64_t first) {
        call.at(first);
        a.entropy = needs_entropy ? call.moved(entropy, first) : nullptr;
        a.total = needs_sum ? call.moved(sum, first) : nullptr;
      },
      [&](int64_t first, int64_t rows) {
        call.put_lse(lses, first);
        for (int64_t t = 0; t < rows; ++t) {
          const int64_t column = call.column(first + t);
          const double top = lses.get(2 * (first + t)), log_sum = lses.get(2 * (first + t) + 1);
          to.set(first + t, ((column >= 0 ? logits.get(t) : 0) - top) - log_sum);
          if (needs_hits) hit[first + t] = a.best_column[t] == column && !std::isnan(top + log_sum);
        }
      });
  return {logprobs, lse, entropy, hits, sum};
}

std::tuple<Tensor, Tensor> linear_logprobs_bwd_cpp(const OptTensor& dlogprobs, const OptTensor& dentropy,
                                                   const OptTensor& dlse, const OptTensor& dsum, const Tensor& hidden,
                                                   const Tensor& weight, const Tensor& tokens, const Tensor& lse,
                                                   const OptTensor& entropy, double inv_temperature, double softcap,
                                                   int64_t vocab_start, int64_t vocab_size, bool needs_dhidden,
                                                   bool needs_dweight) {
  check_cpu();
  TokenCall call(hidden, weight, tokens, inv_temperature, softcap, vocab_start, vocab_size, HeadStore::gradient);
  HeadGradients gradients(call, hidden, weight, needs_dhidden, needs_dweight);
  if (!needs_dhidden && !needs_dweight) return gradients.done();
  call.prepare();
  LinearHead& a = call.a;
  void* coefficients[4];
  for (void*& p : coefficients) p = call.row_numbers();
  a.a = coefficients[0], a.b = coefficients[1], a.s = coefficients[2], a.k = coefficients[3];
  const Numbers lses(lse);
  const auto value = [](const OptTensor& t, int64_t i) { return t.has_value() ? Numbers(*t).get(i) : 0.0; };
  call.run(
      [&](int64_t first) {
        call.at(first);
        gradients.at(first);
        call.get_lse(lses, first);
        for (int64_t t = 0; t < a.rows; ++t) {
          const int64_t i = first + t;
          // The gradient of logit j, where y is the label and dlogprobs, dentropy, dlse and dsum are the upstream gradients:
          // dl_j = dlogprobs ([j = y] - p_j) - dentropy p_j (l_j - lse + entropy) + dlse p_j + dsum
          const double up = value(dlogprobs, i), tilt = value(dentropy, i);
          const double rest = value(dlse, i) - (tilt == 0 ? 0 : tilt * value(entropy, i));
          const double each[4] = {rest - up, -tilt, value(dsum, i), rest};
          for (int c = 0; c < 4; ++c) Numbers(coefficients[c], call.wide()).set(t, each[c] * inv_temperature);
        }
      },
      [](int64_t, int64_t) {});
  return gradients.done();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "linear_logprobs_fwd.cpp", linear_logprobs_fwd_cpp);
  INTERNLM2_IMPL(m, "linear_logprobs_bwd.cpp", linear_logprobs_bwd_cpp);
}

}  // namespace internlm2
