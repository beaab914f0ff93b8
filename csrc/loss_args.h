// What the bindings of the losses share: labels, reductions, numbers of either accumulator.
#pragma once
#include <cmath>
#include <vector>

#include "stable.h"

namespace internlm2 {

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

// The accumulator's numbers, float or double, behind one face.
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

// Labels less `start`, -1 for those equal to `ignored` (where not null) or outside [0, width); all within [0, classes) or
// ignored, checked before anything is written.
inline void read_labels(const char* argument, const Tensor& labels, int64_t classes, const int64_t* ignored, int64_t start,
                        int64_t width, int64_t* to) {
  const bool narrow = dtype_of(labels) == Dtype::i32;
  const void* p = cdata(labels);
  for (int64_t t = 0, n = labels.numel(); t < n; ++t) {
    const int64_t label = narrow ? static_cast<const int32_t*>(p)[t] : static_cast<const int64_t*>(p)[t];
    const bool skip = ignored != nullptr && label == *ignored;
    STD_TORCH_CHECK(skip || (label >= 0 && label < classes), "ValueError: ", argument, ": expected values from 0 to ",
                    classes - 1, ignored != nullptr ? " or ignore_index" : "", ", got ", label);
    to[t] = skip || label < start || label >= start + width ? -1 : label - start;
  }
}

// How a loss over [T] rows is made of its rows: their weights (0: ignored), and what the sum is divided by.
struct LossRows {
  const int64_t* label;    // [T], -1: ignored
  const Numbers* weights;  // [T] or null
  int64_t rows;
  Reduction reduction;
  double label_smoothing, z_loss;
  int64_t classes;

  double weight(int64_t t) const { return label[t] < 0 ? 0 : weights == nullptr ? 1 : weights->get(t); }
  // 1 over the divisor; nothing over nothing is 0.
  double factor() const {
    double total = 0;
    if (reduction != Reduction::mean) return 1;
    for (int64_t t = 0; t < rows; ++t) total += weight(t);
    return total == 0 ? 1 : 1 / total;
  }
  // The loss of row t before its weight; `mean`: of its logits, where label_smoothing asks for it.
  // `rest`: what rounding cut off lse, which a certain label's loss is made of.
  double loss(double lse, double rest, double label_logit, double mean) const {
    double loss = (1 - label_smoothing) * ((lse - label_logit) + rest);
    if (label_smoothing != 0) loss += label_smoothing * ((lse - mean) + rest);
    if (z_loss != 0) loss += z_loss * lse * lse;
    return loss;
  }
  // dl_j = r (p_j a + s + [j is the label's] (k - a)); the last is kept as k, so that p - 1 is never formed by subtraction.
  double a(double lse) const { return 1 + 2 * z_loss * lse; }
  double k(double lse) const { return 2 * z_loss * lse + label_smoothing; }
  double s() const { return -label_smoothing / static_cast<double>(classes); }
};

// out = gradient * dloss, rounded to the dtype of out (cross_entropy.cpp).
void scale_gradient(const Tensor& dloss, const Tensor& gradient, const Tensor& out);

}  // namespace internlm2
