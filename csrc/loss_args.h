// Shared by the bindings of the losses over a vocabulary: reading labels, reducing losses, and arrays of float or double.
#pragma once
#include "errors.h"
#include "stable.h"

namespace internlm2 {

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

// An array of the accumulator's type, float or (wide) double, whose elements are read and written as double.
class Numbers {
 public:
  explicit Numbers(const Tensor& t) : p_(data(t)), wide_(dtype_of(t) == Dtype::f64) {}
  Numbers(void* p, bool wide) : p_(p), wide_(wide) {}
  double get(int64_t i) const { return wide_ ? static_cast<const double*>(p_)[i] : static_cast<const float*>(p_)[i]; }
  void set(int64_t i, double x) const {
    if (wide_) static_cast<double*>(p_)[i] = x;
    else static_cast<float*>(p_)[i] = static_cast<float>(x);
  }

 private:
  void* p_;
  bool wide_;
};

// Writes label - start to `to`, or -1 where the label is outside [start, start + width) or equals *ignored (where `ignored` is
// not null). Checks that every label that is not ignored is in [0, classes).
inline void read_labels(const char* op, const char* argument, const Tensor& labels, int64_t classes, const int64_t* ignored,
                        int64_t start, int64_t width, int64_t* to) {
  const bool narrow = dtype_of(labels) == Dtype::i32;
  const void* p = cdata(labels);
  for (int64_t t = 0, n = labels.numel(); t < n; ++t) {
    const int64_t label = narrow ? static_cast<const int32_t*>(p)[t] : static_cast<const int64_t*>(p)[t];
    const bool skip = ignored != nullptr && label == *ignored;
    INTERNLM2_CHECK_VALUE(skip || (label >= 0 && label < classes), op, argument, "values from 0 to ", classes - 1,
                          ignored != nullptr ? " or ignore_index" : "", ", got ", label);
    to[t] = skip || label < start || label >= start + width ? -1 : label - start;
  }
}

// A loss over T rows: the weight of each row (0 where it is ignored) and the divisor of the sum of losses.
struct LossRows {
  const int64_t* label;    // [T], -1: ignored
  const Numbers* weights;  // [T] or null
  int64_t rows;
  Reduction reduction;
  double label_smoothing, z_loss;
  int64_t classes;

  double weight(int64_t t) const { return label[t] < 0 ? 0 : weights == nullptr ? 1 : weights->get(t); }
  // 1 / divisor, where the divisor of `mean` is the sum of the weights. 1 where that is 0, so that nothing is divided by 0.
  double factor() const {
    double total = 0;
    if (reduction != Reduction::mean) return 1;
    for (int64_t t = 0; t < rows; ++t) total += weight(t);
    return total == 0 ? 1 : 1 / total;
  }
  // The loss of a row before it is multiplied with the weight; lse = top + log_sum, and `mean` is the mean of the row's logits,
  // for label smoothing. top - label_logit is formed first: for a label of probability close to 1 it is 0, and the loss keeps
  // the digits of log_sum.
  double loss(double top, double log_sum, double label_logit, double mean) const {
    double loss = (1 - label_smoothing) * ((top - label_logit) + log_sum);
    if (label_smoothing != 0) loss += label_smoothing * ((top - mean) + log_sum);
    return loss + z(top, log_sum);
  }
  double z(double top, double log_sum) const { return z_loss == 0 ? 0 : z_loss * (top + log_sum) * (top + log_sum); }
  // The gradient of logit j of a row with factor r is r (p_j a + s), and for the label r ((p_j - 1) a + k + s). The latter is
  // written with p_j - 1, computed by expm1, so that a probability close to 1 loses no digits.
  double a(double lse) const { return 1 + 2 * z_loss * lse; }
  double k(double lse) const { return 2 * z_loss * lse + label_smoothing; }
  double s() const { return -label_smoothing / static_cast<double>(classes); }
};

// Collects the losses of rows into a tensor: one for each row (Reduction::none), or their sum times a factor as one number.
class LossSum {
 public:
  // If `wanted` is false, the tensor has no elements.
  LossSum(const Tensor& like, const LossRows& rows, bool wanted)
      : each_(rows.reduction == Reduction::none),
        out_(each_ || !wanted ? torch::stable::new_empty(like, {wanted ? rows.rows : 0}, accumulator_of(like))
                              : torch::stable::new_empty(like, {}, accumulator_of(like))),
        wanted_(wanted),
        numbers_(out_) {}
  void add(int64_t t, double loss) {
    if (each_ && wanted_) numbers_.set(t, loss);
    sum_ += loss;
  }
  Tensor done(double factor) {
    if (!each_ && wanted_) numbers_.set(0, sum_ * factor);
    return out_;
  }

 private:
  bool each_;
  Tensor out_;
  bool wanted_;
  Numbers numbers_;
  double sum_ = 0;
};

// out = gradient * dloss, rounded to the dtype of out (cross_entropy.cpp).
void scale_gradient(const Tensor& dloss, const Tensor& gradient, const Tensor& out);

}  // namespace internlm2
