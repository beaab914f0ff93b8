#include "adamw.h"

#include <cmath>

#include "tensor_list.h"

namespace internlm2 {
namespace {

// ---------------------------------------------------------------------------------------------------------------- checks
constexpr const char* kOp = "adamw";

const char* name_of(Dtype dtype) {
  static const char* const names[] = {"float32", "bfloat16", "float16", "float64", "int32", "int64", "int8"};
  return names[static_cast<int>(dtype)];
}

template <typename T>
void check_length(const char* argument, const std::vector<T>& list, size_t length,
                  const char* what = " tensors, as many as params") {
  INTERNLM2_CHECK_VALUE(list.size() == length, kOp, argument, length, what, ", got ", list.size());
}

// Checks that entry i of the list `argument` has the same number of elements as parameter i, and the same strides, so that
// equal offsets in memory are equal elements.
void check_entry(const char* argument, const Tensor& entry, const Tensor& param, size_t i) {
  INTERNLM2_CHECK_VALUE(entry.numel() == param.numel(), kOp, argument, param.numel(), " elements at ", i,
                        ", as in params, got ", entry.numel());
  bool same = entry.is_contiguous() && param.is_contiguous();
  if (!same && entry.dim() == param.dim() && is_dense(entry)) {
    same = true;
    for (int64_t d = 0; d < param.dim(); ++d) {
      same = same && entry.size(d) == param.size(d) && (param.size(d) <= 1 || entry.stride(d) == param.stride(d));
    }
  }
  INTERNLM2_CHECK_VALUE(same, kOp, argument, "a dense tensor of the layout of params at ", i, ", got another");
}

void check_dtype(const char* argument, const Tensor& entry, std::initializer_list<Dtype> accepted, size_t i) {
  const Dtype got = dtype_of(entry);
  std::string names;
  for (Dtype dtype : accepted) {
    if (dtype == got) return;
    names += (names.empty() ? "" : " or ") + std::string(name_of(dtype));
  }
  INTERNLM2_CHECK_VALUE(false, kOp, argument, names, " at ", i, ", got ", name_of(got));
}

double scalar_of(const char* argument, const Tensor& t) {
  INTERNLM2_CHECK_VALUE(t.numel() == 1, kOp, argument, "one element, got ", t.numel());
  const Dtype dtype = dtype_of(t);
  INTERNLM2_CHECK_VALUE(dtype == Dtype::f32 || dtype == Dtype::f64, kOp, argument, "float32, got ", name_of(dtype));
  if (dtype == Dtype::f64) return *static_cast<const double*>(cdata(t));
  return static_cast<double>(*static_cast<const float*>(cdata(t)));
}

struct Lists {
  const Tensors &params, &grads, &masters, &exp_avgs, &exp_avg_sqs, &steps;
  const std::vector<int64_t>& indices;
  const std::vector<int64_t>& offsets;  // the first element of each shard in its whole tensor; empty: all 0
};

void check_lists(const Lists& l) {
  const size_t count = l.params.size();
  check_length("grads", l.grads, count);
  if (!l.masters.empty()) check_length("masters", l.masters, count);
  check_length("exp_avgs", l.exp_avgs, count);
  check_length("exp_avg_sqs", l.exp_avg_sqs, count);
  check_length("steps", l.steps, count);
  check_length("indices", l.indices, count, " numbers, as many as params");
  if (!l.offsets.empty()) check_length("offsets", l.offsets, count, " numbers, as many as params, or none");
  for (int64_t index : l.indices) {
    INTERNLM2_CHECK_VALUE(index >= 0 && index < kIndices, kOp, "indices", "numbers from 0 to 2^30 - 1, got ", index);
  }
  for (int64_t offset : l.offsets) INTERNLM2_CHECK_VALUE(offset >= 0, kOp, "offsets", "numbers >= 0, got ", offset);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = l.params[i];
    const Dtype dtype = dtype_of(param);
    const bool wide = dtype == Dtype::f64;
    check_dtype("params", param, {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64}, i);
    check_dense(kOp, "params", param, i);
    check_entry("grads", l.grads[i], param, i);
    wide ? check_dtype("grads", l.grads[i], {dtype}, i) : check_dtype("grads", l.grads[i], {dtype, Dtype::f32}, i);
    if (!l.masters.empty()) {
      check_entry("masters", l.masters[i], param, i);
      check_dtype("masters", l.masters[i], {wide ? Dtype::f64 : Dtype::f32}, i);
    }
    check_entry("exp_avgs", l.exp_avgs[i], param, i);
    wide ? check_dtype("exp_avgs", l.exp_avgs[i], {dtype}, i)
         : check_dtype("exp_avgs", l.exp_avgs[i], {Dtype::f32, Dtype::bf16}, i);
    check_entry("exp_avg_sqs", l.exp_avg_sqs[i], param, i);
    check_dtype("exp_avg_sqs", l.exp_avg_sqs[i], {dtype_of(l.exp_avgs[i])}, i);
    check_dtype("steps", l.steps[i], {Dtype::f32}, i);
    INTERNLM2_CHECK_VALUE(l.steps[i].numel() == 1, kOp, "steps", "one element at ", i, ", got ", l.steps[i].numel());
  }
}

// ------------------------------------------------------------------------------------------------------------------ step
// Increments the step counts and computes the constants of each tensor's update.
std::vector<AdamwTensor> tensors_of(const Lists& l, const Adamw& a, double lr, double weight_decay) {
  std::vector<AdamwTensor> tensors;
  tensors.reserve(l.params.size());
  for (size_t i = 0; i < l.params.size(); ++i) {
    auto* count = static_cast<float*>(data(l.steps[i]));
    *count += 1;
    const double step = *count;
    AdamwTensor t{};
    t.dtype = dtype_of(l.params[i]);
    t.grad_dtype = dtype_of(l.grads[i]);
    t.moment_dtype = dtype_of(l.exp_avgs[i]);
    t.param = data(l.params[i]);
    t.grad = cdata(l.grads[i]);
    t.master = l.masters.empty() ? nullptr : data(l.masters[i]);
    t.exp_avg = data(l.exp_avgs[i]);
    t.exp_avg_sq = data(l.exp_avg_sqs[i]);
    t.numel = l.params[i].numel();
    t.offset = l.offsets.empty() ? 0 : l.offsets[i];
    t.decay = 1 - lr * weight_decay;
    t.step_size = lr / (1 - std::pow(a.beta1, step));
    t.root_scale = 1 / std::sqrt(1 - std::pow(a.beta2, step));
    t.index = static_cast<uint32_t>(l.indices[i]);
    t.step = static_cast<uint32_t>(static_cast<int64_t>(step));
    tensors.push_back(t);
  }
  return tensors;
}

void adamw_step_cpp(const Tensors& params, const Tensors& grads, const Tensors& masters, const Tensors& exp_avgs,
                    const Tensors& exp_avg_sqs, const Tensors& steps, const Tensor& skipped, const OptTensor& total_sq,
                    const OptTensor& grad_scale, const OptTensor& found_inf, const Tensor& lr, double beta1, double beta2,
                    double eps, double weight_decay, double max_grad_norm, bool stochastic_rounding, bool maximize,
                    int64_t seed, const std::vector<int64_t>& indices, const std::vector<int64_t>& offsets) {
  check_cpu();
  const Lists lists{params, grads, masters, exp_avgs, exp_avg_sqs, steps, indices, offsets};
  check_lists(lists);
  INTERNLM2_CHECK_VALUE(dtype_of(skipped) == Dtype::i64 && skipped.numel() == 1, kOp, "skipped", "one int64, got ",
                        skipped.numel(), " of ", name_of(dtype_of(skipped)));
  const double scale = grad_scale.has_value() ? scalar_of("grad_scale", *grad_scale) : 1;
  const double norm = total_sq.has_value() ? std::sqrt(scalar_of("total_sq", *total_sq)) / scale : 0;
  const double rate = scalar_of("lr", lr);
  const bool overflow = found_inf.has_value() && scalar_of("found_inf", *found_inf) != 0;
  if (overflow || !std::isfinite(norm) || !std::isfinite(rate)) {
    *static_cast<int64_t*>(data(skipped)) += 1;
    return;
  }
  const double coefficient = total_sq.has_value() && max_grad_norm > 0 ? std::min(1.0, max_grad_norm / (norm + 1e-6)) : 1;
  const auto bits = static_cast<uint64_t>(seed);
  const Adamw a{beta1, beta2, eps, (maximize ? -coefficient : coefficient) / scale, stochastic_rounding,
                static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
  const std::vector<AdamwTensor> tensors = tensors_of(lists, a, rate, weight_decay);
  Chunks chunks;
  for (const AdamwTensor& t : tensors) chunks.add(t.numel);
  chunks.run([&](int64_t, size_t i, int64_t begin) {
    INTERNLM2_CPU(adamw_step, a, tensors[i], begin, std::min(begin + kListChunk, tensors[i].numel));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) { INTERNLM2_IMPL(m, "adamw_step_.cpp", adamw_step_cpp); }

}  // namespace internlm2
