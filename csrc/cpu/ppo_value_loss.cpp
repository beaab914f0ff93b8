#include <algorithm>
#include <limits>

#include "ppo_loss.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

// The value v clipped to [old - clip, old + clip]. Within that range it is v itself and not old + (v - old), so that the
// clipped and the plain loss have equal bits there.
template <typename Acc> struct Clip {
  using V = Vec<Acc>;
  V most;
  explicit Clip(double clip) : most(static_cast<Acc>(clip < 0 ? kInfinity : clip)) {}
  VEC_INLINE V operator()(V v, V old) const {
    const V difference = v - old;
    const V edge = pick(less(difference, V(0)), old - most, old + most);
    return pick(less(most, magnitude(difference)), edge, v);
  }
};

// Count, mean, and sum of squared deviations from the mean (`squares`) of a set of numbers. add() merges two sets without
// cancellation.
struct Moments {
  double count = 0, mean = 0, squares = 0;
  void add(const Moments& other) {
    if (other.count == 0) return;
    const double all = count + other.count, delta = other.mean - mean;
    squares += other.squares + delta * delta * (count * other.count / all);
    mean += delta * (other.count / all);
    count = all;
  }
};

// The numbers of one row of PpoLoss::partial: the sum of losses, the number of clipped terms, and the moments of the returns
// and of the errors, returns - values, which have the same count.
struct ValueSums {
  double loss = 0, clipped = 0;
  Moments returns, errors;
  void save(double* p) const {
    const double row[kValueSums] = {loss, clipped, returns.count, returns.mean, returns.squares, errors.mean, errors.squares};
    std::copy(row, row + kValueSums, p);
  }
  void add(const double* p) {
    loss += p[0];
    clipped += p[1];
    returns.add({p[2], p[3], p[4]});
    errors.add({p[2], p[5], p[6]});
  }
};

// The moments of x(j, lanes) over the unmasked elements of a block. `count` and `sum` come from a first pass; this second pass
// adds up deviations from sum / count.
template <typename Acc, typename F> VEC_INLINE Moments moments_of(int64_t n, const uint8_t* mask, double count, double sum,
                                                                  const F& x) {
  using V = Vec<Acc>;
  if (count == 0) return {};
  const Acc near = static_cast<Acc>(sum / count);
  V rest, squares;
  for_vectors<V, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
    const V d = only(true_lanes<V>(mask + j, lanes), x(j, lanes) - V(near));
    rest = rest + d;
    squares = fma(d, d, squares);
  });
  const double left = static_cast<double>(rest.sum());
  return {count, static_cast<double>(near) + left / count,
          std::max(0.0, static_cast<double>(squares.sum()) - left * left / count)};
}

template <typename Acc> void value_fwd(const PpoLoss& a, int64_t chunk) {
  using V = Vec<Acc>;
  const Clip<Acc> clip(a.clip);
  ValueSums sums;
  const auto add = [&](int64_t i, int64_t n, const Acc* values, const Acc* old, const Acc* returns) VEC_LAMBDA {
    const uint8_t* mask = a.mask + i;
    WideSum loss;
    V clipped_terms, count, return_sum, error_sum;
    for_vectors<V, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
      const auto keep = true_lanes<V>(mask + j, lanes);
      const V v = load<V>(values + j, lanes), r = load<V>(returns + j, lanes), error = r - v;
      const V far = r - clip(v, load<V>(old + j, lanes)), plain = error * error, other = far * far;
      const auto clipped = less(plain, other);
      loss.add(only(keep, pick(clipped, other, plain)));
      clipped_terms = clipped_terms + only(keep, only(clipped, V(1)));
      count = count + only(keep, V(1));
      return_sum = return_sum + only(keep, r);
      error_sum = error_sum + only(keep, error);
    });
    const double kept = count.sum();
    sums.loss += loss.sum();
    sums.clipped += clipped_terms.sum();
    sums.returns.add(moments_of<Acc>(n, mask, kept, return_sum.sum(), [&](int64_t j, auto lanes) VEC_LAMBDA {
      return load<V>(returns + j, lanes);
    }));
    sums.errors.add(moments_of<Acc>(n, mask, kept, error_sum.sum(), [&](int64_t j, auto lanes) VEC_LAMBDA {
      return load<V>(returns + j, lanes) - load<V>(values + j, lanes);
    }));
  };
  for_blocks<Acc>(chunk * kPpoChunk, std::min(a.n, (chunk + 1) * kPpoChunk), add, a.x, a.old, a.target);
  sums.save(a.partial + chunk * kValueSums);
}

template <typename Acc> void value_total(const PpoLoss& a) {
  ValueSums sums;
  for (int64_t chunk = 0; chunk * kPpoChunk < a.n; ++chunk) sums.add(a.partial + chunk * kValueSums);
  const double count = sums.returns.count, squares = sums.returns.squares;
  // Returns that are all equal have as variance only the rounding error of their mean: explained_variance is then 0. It is also
  // 0 where the variance is too small for Acc, in which `squares` is summed up within a block (but not between blocks).
  const double noise = 8 * std::numeric_limits<Acc>::epsilon() * sums.returns.mean;
  const bool flat = squares <= count * noise * noise || static_cast<Acc>(over(squares, count)) == 0;
  put_results<Acc>(a, 0.5 * sums.loss, sums.clipped, flat ? 0 : 1 - sums.errors.squares / squares, count);
}

template <typename Acc> void value_bwd(const PpoLoss& a, int64_t begin, int64_t end) {
  using V = Vec<Acc>;
  const Clip<Acc> clip(a.clip);
  const V scale(upstream<Acc>(a));
  const auto fill = [&](int64_t i, int64_t n, const Acc* values, const Acc* old, const Acc* returns,
                        Acc* dvalues) VEC_LAMBDA {
    for_vectors<V, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
      const V v = load<V>(values + j, lanes), r = load<V>(returns + j, lanes), error = v - r;
      const V far = clip(v, load<V>(old + j, lanes)) - r;
      const V through = pick(less(error * error, far * far), V(0), error * scale);
      store(dvalues + j, only(true_lanes<V>(a.mask + i + j, lanes), through), lanes);
    });
  };
  for_blocks<Acc>(begin, end, fill, a.x, a.old, a.target, a.dx);
}

}  // namespace

void ppo_value_loss_fwd(const PpoLoss& a, int64_t begin, int64_t end) {
  WITH_ACC(a.acc, Acc, { for (; begin < end; ++begin) value_fwd<Acc>(a, begin); })
}
void ppo_value_loss_total(const PpoLoss& a) { WITH_ACC(a.acc, Acc, { value_total<Acc>(a); }) }
void ppo_value_loss_bwd(const PpoLoss& a, int64_t begin, int64_t end) {
  WITH_ACC(a.acc, Acc, { value_bwd<Acc>(a, begin, end); })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
