#include "sample.h"

#include "checks.h"
#include "threads.h"

namespace internlm2 {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kSerial = 1 << 15;  // logits below which a second thread costs more than it saves

// An option that is one number for all rows, or a tensor with one for each.
class Option {
 public:
  Option(const OptTensor& each, double all) : all_(all) {
    if (!each.has_value()) return;
    data_ = cdata(*each);
    dtype_ = dtype_of(*each);
  }
  double at(int64_t row) const {
    if (data_ == nullptr) return all_;
    switch (dtype_) {
      case Dtype::f64: return static_cast<const double*>(data_)[row];
      case Dtype::i64: return static_cast<double>(static_cast<const int64_t*>(data_)[row]);
      case Dtype::i32: return static_cast<const int32_t*>(data_)[row];
      default: return static_cast<const float*>(data_)[row];
    }
  }

 private:
  double all_;
  const void* data_ = nullptr;
  Dtype dtype_ = Dtype::f32;
};

void check_option(bool right, const char* argument, const char* expected, double got, int64_t row) {
  INTERNLM2_CHECK_VALUE(right, "sample", argument, expected, ", got ", got, " in row ", row);
}

bool finite(double x) { return x >= -3.4028234663852886e38 && x <= 3.4028234663852886e38; }

void check_bias(const Tensor& values) {
  const auto* p = static_cast<const float*>(cdata(values));
  const int64_t width = values.size(1);
  for (int64_t i = 0; i < values.numel(); ++i) {
    check_option(p[i] <= 3.4028234663852886e38f, "bias_values", "finite numbers or -inf", p[i], i / width);
  }
}

void raise(SampleFault fault, int64_t row) {
  INTERNLM2_CHECK_VALUE(fault != SampleFault::logits, "sample", "logits",
                        "finite numbers, or -inf, also after the division by temperature, got NaN or infinity in row ", row);
  INTERNLM2_CHECK_VALUE(fault != SampleFault::overflow, "sample", "logits",
                        "finite numbers, or -inf, also with penalties and bias, got NaN or infinity in row ", row);
  INTERNLM2_CHECK_VALUE(fault != SampleFault::nothing_left, "sample", "logits",
                        "at least one token that is allowed and not -inf, got none in row ", row);
}

Results sample_fwd_cpp(const Tensor& logits, const OptTensor& seeds, const OptTensor& positions, const OptTensor& temperature,
                       double temperature_all, const OptTensor& top_k, int64_t top_k_all, const OptTensor& top_p,
                       double top_p_all, const OptTensor& min_p, double min_p_all, const OptTensor& repetition_penalty,
                       double repetition_all, const OptTensor& presence_penalty, double presence_all,
                       const OptTensor& frequency_penalty, double frequency_all, const OptTensor& token_ids,
                       const OptTensor& prompt_lengths, const OptTensor& bias_ids, const OptTensor& bias_values,
                       const OptTensor& allowed, int64_t num_top, bool needs_filtered) {
  check_cpu();
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  Sample a{};
  a.dtype = dtype_of(logits);
  a.logits = cdata(logits);
  a.stride = logits.stride(0);
  a.vocab = vocab;

  const Option temperatures(temperature, temperature_all), ranks(top_k, static_cast<double>(top_k_all)),
      masses(top_p, top_p_all), ratios(min_p, min_p_all), repetitions(repetition_penalty, repetition_all),
      presences(presence_penalty, presence_all), frequencies(frequency_penalty, frequency_all), prompts(prompt_lengths, 0);
  std::vector<SampleOptions> options(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) {
    SampleOptions& o = options[static_cast<size_t>(row)];
    const double t = temperatures.at(row), k = ranks.at(row), repetition = repetitions.at(row);
    check_option(t == 0 || (static_cast<float>(t) >= 1e-6f && t <= 1e6), "temperature", "0 or a number from 1e-6 to 1e6", t, row);
    o.greedy = t == 0;
    o.inverse = o.greedy ? 1 : static_cast<float>(1 / t);
    check_option(k >= 0, "top_k", "0 (all tokens) or more", k, row);
    o.top_k = static_cast<int64_t>(k < static_cast<double>(vocab) ? k : static_cast<double>(vocab));
    o.top_p = masses.at(row);
    check_option(o.top_p > 0 && o.top_p <= 1, "top_p", "a number above 0 and at most 1", o.top_p, row);
    o.min_p = ratios.at(row);
    check_option(o.min_p >= 0 && o.min_p <= 1, "min_p", "a number from 0 to 1", o.min_p, row);
    check_option(static_cast<float>(repetition) >= 1e-6f && repetition <= 1e6, "repetition_penalty", "a number from 1e-6 to 1e6", repetition, row);
    check_option(finite(presences.at(row)), "presence_penalty", "a finite number", presences.at(row), row);
    check_option(finite(frequencies.at(row)), "frequency_penalty", "a finite number", frequencies.at(row), row);
    o.repetition = static_cast<float>(repetition);
    o.presence = static_cast<float>(presences.at(row));
    o.frequency = static_cast<float>(frequencies.at(row));
    o.prompt = static_cast<int64_t>(std::min(prompts.at(row), 9e15));  // the largest int64 is no double
    o.seed = seeds.has_value() ? static_cast<const uint64_t*>(cdata(*seeds))[row] : 0;
    o.position = positions.has_value() ? static_cast<const uint64_t*>(cdata(*positions))[row] : 0;
  }
  a.options = options.data();

  if (token_ids.has_value()) {
    check_range("sample", "token_ids", *token_ids, -1, vocab);
    a.token_ids = in_of(*token_ids);
    a.history = token_ids->size(1);
  }
  if (bias_ids.has_value()) {
    check_range("sample", "bias_ids", *bias_ids, -1, vocab);
    check_bias(*bias_values);
    a.bias_ids = in_of(*bias_ids);
    a.biases = bias_ids->size(1);
    a.bias_values = static_cast<const float*>(cdata(*bias_values));
  }
  if (allowed.has_value()) {
    const bool packed = allowed->scalar_type() == torch::headeronly::ScalarType::Int;
    (packed ? reinterpret_cast<const void*&>(a.allowed_bits) : reinterpret_cast<const void*&>(a.allowed_bytes)) =
        cdata(*allowed);
    a.allowed_stride = allowed->stride(0);
  }

  using torch::headeronly::ScalarType;
  const auto fresh = [&](std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(logits, {sizes.begin(), sizes.size()}, dtype);
  };
  Tensor tokens = fresh({rows}, ScalarType::Long), logprobs = fresh({rows}, ScalarType::Float);
  Tensor top_ids = fresh({rows, num_top}, ScalarType::Long), top_logprobs = fresh({rows, num_top}, ScalarType::Float);
  Tensor filtered = fresh({needs_filtered ? rows : 0}, ScalarType::Float);
  std::vector<SampleFault> faults(static_cast<size_t>(rows));
  a.top = num_top;
  a.tokens = static_cast<int64_t*>(data(tokens));
  a.logprobs = static_cast<float*>(data(logprobs));
  a.top_ids = static_cast<int64_t*>(data(top_ids));
  a.top_logprobs = static_cast<float*>(data(top_logprobs));
  a.filtered = needs_filtered ? static_cast<float*>(data(filtered)) : nullptr;
  a.faults = faults.data();

  // A tile is a group of rows of nearly equal size, so that every thread has work.
  const int64_t threads = rows * vocab < kSerial ? 1 : workers_for(rows);
  const int64_t groups = std::max<int64_t>((rows + kSampleRows - 1) / kSampleRows, threads);
  const int64_t workers = std::min(threads, std::max<int64_t>(groups, 1)), bytes = INTERNLM2_CPU(sample_scratch, a);
  if (rows > 0) {
    const Tensor scratch = fresh({workers * bytes}, ScalarType::Char);
    const auto at = [&](int64_t worker) { return static_cast<char*>(data(scratch)) + worker * bytes; };
    for (int64_t worker = 0; worker < workers; ++worker) INTERNLM2_CPU(sample_prepare, a, at(worker));
    for_tiles(groups, workers, [&](int64_t group, int64_t worker) {
      INTERNLM2_CPU(sample_rows, a, rows * group / groups, rows * (group + 1) / groups, at(worker));
    });
  }
  for (int64_t row = 0; row < rows; ++row) raise(faults[static_cast<size_t>(row)], row);
  return {tokens, logprobs, top_ids, top_logprobs, filtered};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) { INTERNLM2_IMPL(m, "sample_fwd.cpp", sample_fwd_cpp); }

}  // namespace internlm2
