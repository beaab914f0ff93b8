#include "linear_head_call.h"

namespace internlm2 {
namespace {

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;
using Quadruple = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Options {
  const Tensor& labels;
  const OptTensor& token_weights;
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
  int64_t reduction;
};

// A HeadCall that computes a loss for each row.
class LossCall : public HeadCall {
 public:
  LossCall(const Tensor& hidden, const Tensor& weight, const Options& o, HeadStore store)
      : HeadCall(hidden, weight, 1, o.softcap, store), label_(static_cast<int64_t*>(take(tokens() * 8))) {
    read_labels("linear_cross_entropy", "labels", o.labels, a.vocab, &o.ignore_index, 0, a.vocab, label_);
    if (o.token_weights.has_value()) weights_.emplace(*o.token_weights);
    rows_ = {label_,   weights_.has_value() ? &*weights_ : nullptr, tokens(), static_cast<Reduction>(o.reduction),
             o.label_smoothing, o.z_loss, a.vocab};
    factor_ = rows_.factor();
  }

  // Does what prepare() does, and allocates the arrays that only the loss and its gradient need.
  void prepare_loss() {
    prepare();
    if (a.store != HeadStore::gradient && rows_.label_smoothing != 0) {
      a.block_total = statistic(acc_size());
      a.total = row_numbers();
    }
    if (a.store == HeadStore::none) return;
    for (const void** p : {&a.a, &a.b, &a.s, &a.k}) *p = row_numbers();
  }
  void at(int64_t first) { a.label = label_ + first; }

  LossSum losses(const Tensor& like, bool wanted) const { return LossSum(like, rows_, wanted); }
  // Adds the weighted loss and z-loss of row t of the chunk that begins at token `first`; both are 0 where the row is ignored.
  void add_losses(int64_t first, int64_t t, LossSum& loss, LossSum& z_loss) const {
    const double weight = rows_.weight(first + t), mean = a.total ? number(a.total, t) / a.vocab : 0;
    const double top = number(a.top, t), log_sum = number(a.log_sum, t);
    loss.add(first + t, weight == 0 ? 0 : weight * rows_.loss(top, log_sum, number(a.label_logit, t), mean));
    z_loss.add(first + t, weight == 0 ? 0 : weight * rows_.z(top, log_sum));
  }
  void coefficients(int64_t first, int64_t t, double dloss) const {
    const double lse = number(a.top, t) + number(a.log_sum, t), weight = rows_.weight(first + t);
    const double r = weight == 0 ? 0 : weight * factor_ * dloss;
    const auto set = [&](const void* to, double x) { Numbers(const_cast<void*>(to), wide()).set(t, r == 0 ? 0 : r * x); };
    set(a.a, rows_.a(lse));
    set(a.b, 0);
    set(a.s, rows_.s());
    set(a.k, rows_.k(lse));
  }
  double factor() const { return factor_; }

 private:
  double number(const void* p, int64_t t) const { return Numbers(const_cast<void*>(p), wide()).get(t); }

  int64_t* label_;
  std::optional<Numbers> weights_;
  LossRows rows_{};
  double factor_ = 1;
};

Triple linear_cross_entropy_fwd_cpp(const Tensor& hidden, const Tensor& weight, const Tensor& labels,
                                    const OptTensor& token_weights, int64_t ignore_index, double label_smoothing,
                                    double z_loss, double softcap, int64_t reduction, bool return_z_loss) {
  check_cpu();
  LossCall call(hidden, weight, {labels, token_weights, ignore_index, label_smoothing, z_loss, softcap, reduction},
                HeadStore::none);
  call.prepare_loss();
  Tensor lse = call.numbers({call.tokens(), 2});
  const Numbers lses(lse);
  LossSum loss = call.losses(hidden, true), z = call.losses(hidden, return_z_loss);
  call.run(
      [&](int64_t first) { call.at(first); },
      [&](int64_t first, int64_t rows) {
        call.put_lse(lses, first);
        for (int64_t t = 0; t < rows; ++t) call.add_losses(first, t, loss, z);
      });
  return {loss.done(call.factor()), z.done(call.factor()), lse};
}

Quadruple linear_cross_entropy_grad_fwd_cpp(const Tensor& hidden, const Tensor& weight, const Tensor& labels,
                                            const OptTensor& token_weights, int64_t ignore_index, double label_smoothing,
                                            double z_loss, double softcap, int64_t reduction, bool return_z_loss,
                                            bool needs_dhidden, bool needs_dweight) {
  check_cpu();
  const bool rounded = dtype_of(hidden) == Dtype::bf16 && softcap <= 0;
  LossCall call(hidden, weight, {labels, token_weights, ignore_index, label_smoothing, z_loss, softcap, reduction},
                rounded ? HeadStore::exponentials : HeadStore::logits);
  LossSum loss = call.losses(hidden, true), z = call.losses(hidden, return_z_loss);
  // Gradients for an upstream gradient of 1, in the accumulator's dtype: the backward multiplies them with the real one, and
  // only then rounds.
  Tensor dhidden = call.numbers({needs_dhidden ? call.tokens() : 0, call.a.d});
  Tensor dweight = call.numbers({needs_dweight ? call.a.vocab : 0, call.a.d});
  call.a.dhidden_dtype = dtype_of(dhidden);
  call.a.dweight_sum = needs_dweight ? data(dweight) : nullptr;
  call.a.dhidden = needs_dhidden ? data(dhidden) : nullptr;
  call.prepare_loss();
  call.run(
      [&](int64_t first) {
        call.at(first);
        if (needs_dhidden) {
          call.a.dhidden = static_cast<char*>(data(dhidden)) + first * call.a.d * dhidden.element_size();
        }
      },
      [&](int64_t first, int64_t rows) {
        for (int64_t t = 0; t < rows; ++t) {
          call.add_losses(first, t, loss, z);
          call.coefficients(first, t, 1);
        }
      });
  if (call.tokens() == 0) clear(dweight);
  return {loss.done(call.factor()), z.done(call.factor()), dhidden, dweight};
}

Pair linear_cross_entropy_bwd_cpp(const Tensor& dloss, const Tensor& hidden, const Tensor& weight, const Tensor& labels,
                                  const OptTensor& token_weights, const Tensor& lse, int64_t ignore_index,
                                  double label_smoothing, double z_loss, double softcap, int64_t reduction,
                                  bool needs_dhidden, bool needs_dweight) {
  check_cpu();
  LossCall call(hidden, weight, {labels, token_weights, ignore_index, label_smoothing, z_loss, softcap, reduction},
                HeadStore::gradient);
  HeadGradients gradients(call, hidden, weight, needs_dhidden, needs_dweight);
  call.prepare_loss();
  const Numbers upstream(dloss), lses(lse);
  const bool each = static_cast<Reduction>(reduction) == Reduction::none;
  call.run(
      [&](int64_t first) {
        call.at(first);
        gradients.at(first);
        call.get_lse(lses, first);
        for (int64_t t = 0; t < call.a.rows; ++t) call.coefficients(first, t, upstream.get(each ? first + t : 0));
      },
      [](int64_t, int64_t) {});
  return gradients.done();
}

Pair linear_cross_entropy_scale_bwd_cpp(const Tensor& dloss, const Tensor& dhidden, const Tensor& dweight,
                                        const Tensor& hidden, const Tensor& weight) {
  check_cpu();
  Tensor dh = torch::stable::new_empty(hidden, dhidden.sizes()), dw = torch::stable::new_empty(weight, dweight.sizes());
  scale_gradient(dloss, dhidden, dh);
  scale_gradient(dloss, dweight, dw);
  return {dh, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  INTERNLM2_IMPL(m, "linear_cross_entropy_fwd.cpp", linear_cross_entropy_fwd_cpp);
  INTERNLM2_IMPL(m, "linear_cross_entropy_grad_fwd.cpp", linear_cross_entropy_grad_fwd_cpp);
  INTERNLM2_IMPL(m, "linear_cross_entropy_bwd.cpp", linear_cross_entropy_bwd_cpp);
  INTERNLM2_IMPL(m, "linear_cross_entropy_scale_bwd.cpp", linear_cross_entropy_scale_bwd_cpp);
}

}  // namespace internlm2
