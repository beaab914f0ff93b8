#include "cross_entropy.h"

#include "loss_args.h"
#include "threads.h"

namespace internlm2 {
namespace {

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

// The arguments that the kernels of forward and backward share, with the label and the gradient's factor of each row.
class Call {
 public:
  CrossEntropy a{};

  Call(const Tensor& logits, const Tensor& labels, int64_t ignore_index, double label_smoothing, double z_loss,
       double softcap, int64_t reduction)
      : logits_(logits), label_(static_cast<size_t>(logits.size(0))), factor_(label_.size()) {
    check_cpu();
    a.dtype = dtype_of(logits);
    a.logits = cdata(logits);
    a.stride = logits.stride(0);
    a.cols = logits.size(1);
    a.label_smoothing = label_smoothing;
    a.z_loss = z_loss;
    a.softcap = softcap;
    read_labels("cross_entropy", "labels", labels, a.cols, &ignore_index, 0, a.cols, label_.data());
    a.label = label_.data();
    a.factor = factor_.data();
    loss_ = {label_.data(), nullptr, rows(), static_cast<Reduction>(reduction), label_smoothing, z_loss, a.cols};
  }

  int64_t rows() const { return logits_.size(0); }
  bool each() const { return loss_.reduction == Reduction::none; }
  Tensor row_numbers(bool wanted = true) const {
    return torch::stable::new_empty(logits_, {wanted ? rows() : 0}, accumulator_of(logits_));
  }
  Tensor row_pairs() const { return torch::stable::new_empty(logits_, {rows(), 2}, accumulator_of(logits_)); }
  void set_factors(const Numbers* upstream) {
    const double divided = loss_.factor();
    for (int64_t t = 0; t < rows(); ++t) {
      const double up = upstream == nullptr ? 1 : upstream->get(each() ? t : 0);
      factor_[t] = loss_.weight(t) == 0 ? 0 : loss_.weight(t) * divided * up;  // not 0 * NaN where a row is ignored
    }
  }
  void write_to(const Tensor& dlogits) {
    a.dlogits = data(dlogits);
    a.dlogits_stride = a.cols;
  }
  int64_t grain() const { return grain_of(16384, a.cols); }

  // Returns the loss and the z-loss. The kernel also writes lse, and the gradient of the logits where write_to() was called.
  Pair forward(const Tensor& lse, bool return_z_loss) {
    const Tensor logit = row_numbers(), total = row_numbers(loss_.label_smoothing != 0);
    a.lse = data(lse);
    a.label_logit = data(logit);
    a.total = loss_.label_smoothing != 0 ? data(total) : nullptr;
    for_rows(rows(), grain(), [&](int64_t b, int64_t e) { INTERNLM2_CPU(cross_entropy_fwd, a, b, e); });
    const Numbers lses(lse), labels(logit), totals(total);
    LossSum loss(logits_, loss_, true), z_loss(logits_, loss_, return_z_loss);
    for (int64_t t = 0; t < rows(); ++t) {
      const bool counts = loss_.weight(t) != 0;
      const double top = lses.get(2 * t), log_sum = lses.get(2 * t + 1);
      const double mean = a.total != nullptr ? totals.get(t) / static_cast<double>(a.cols) : 0;
      loss.add(t, counts ? loss_.loss(top, log_sum, labels.get(t), mean) : 0);
      z_loss.add(t, counts ? loss_.z(top, log_sum) : 0);
    }
    return {loss.done(loss_.factor()), z_loss.done(loss_.factor())};
  }
  void backward(const Tensor& dloss, const Tensor& lse) {
    INTERNLM2_CHECK_VALUE(lse.numel() == 2 * rows(), "cross_entropy", "lse", "shape [", rows(), ", 2], got ", lse.numel(),
                          " numbers");
    const Numbers upstream(dloss);
    set_factors(&upstream);
    a.lse = data(lse);
    for_rows(rows(), grain(), [&](int64_t b, int64_t e) { INTERNLM2_CPU(cross_entropy_bwd, a, b, e); });
  }

 private:
  const Tensor& logits_;
  std::vector<int64_t> label_;
  std::vector<double> factor_;
  LossRows loss_{};
};

Triple cross_entropy_fwd_cpp(const Tensor& logits, const Tensor& labels, int64_t ignore_index, double label_smoothing,
                             double z_loss, double softcap, int64_t reduction, bool return_z_loss) {
  Call call(logits, labels, ignore_index, label_smoothing, z_loss, softcap, reduction);
  Tensor lse = call.row_pairs();
  const auto [loss, z] = call.forward(lse, return_z_loss);
  return {loss, z, lse};
}

Triple cross_entropy_grad_fwd_cpp(const Tensor& logits, const Tensor& labels, int64_t ignore_index, double label_smoothing,
                                  double z_loss, double softcap, int64_t reduction, bool return_z_loss) {
  Call call(logits, labels, ignore_index, label_smoothing, z_loss, softcap, reduction);
  Tensor dlogits = empty_as(logits);
  call.set_factors(nullptr);
  call.write_to(dlogits);
  const auto [loss, z] = call.forward(call.row_pairs(), return_z_loss);
  return {loss, z, dlogits};
}

Tensor cross_entropy_bwd_cpp(const Tensor& dloss, const Tensor& logits, const Tensor& labels, const Tensor& lse,
                             int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                             int64_t reduction) {
  Call call(logits, labels, ignore_index, label_smoothing, z_loss, softcap, reduction);
  Tensor dlogits = empty_as(logits);
  call.write_to(dlogits);
  call.backward(dloss, lse);
  return dlogits;
}

void cross_entropy_bwd_inplace_cpp(const Tensor& dloss, const Tensor& logits, const Tensor& labels, const Tensor& lse,
                                   int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                                   int64_t reduction) {
  Call call(logits, labels, ignore_index, label_smoothing, z_loss, softcap, reduction);
  call.a.dlogits = data(logits);
  call.a.dlogits_stride = call.a.stride;
  call.backward(dloss, lse);
}

Tensor cross_entropy_scale_bwd_cpp(const Tensor& dloss, const Tensor& dlogits) {
  check_cpu();
  Tensor out = empty_as(dlogits);
  scale_gradient(dloss, dlogits, out);
  return out;
}

}  // namespace

void scale_gradient(const Tensor& dloss, const Tensor& gradient, const Tensor& out) {
  const ScaleGradient a{dtype_of(gradient), dtype_of(out), cdata(gradient), data(out), Numbers(dloss).get(0)};
  for_rows(gradient.numel(), 16384, [&](int64_t b, int64_t e) { INTERNLM2_CPU(scale_gradient, a, b, e); });
}

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "cross_entropy_fwd.cpp", cross_entropy_fwd_cpp);
  INTERNLM2_IMPL(m, "cross_entropy_grad_fwd.cpp", cross_entropy_grad_fwd_cpp);
  INTERNLM2_IMPL(m, "cross_entropy_bwd.cpp", cross_entropy_bwd_cpp);
  INTERNLM2_IMPL(m, "cross_entropy_bwd_.cpp", cross_entropy_bwd_inplace_cpp);
  INTERNLM2_IMPL(m, "cross_entropy_scale_bwd.cpp", cross_entropy_scale_bwd_cpp);
}

}  // namespace internlm2
