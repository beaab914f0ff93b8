// One call of PPO's policy or value loss, forward or backward: checks, allocation and distribution over threads.
#pragma once
#include "errors.h"
#include "ppo_loss.h"
#include "threads.h"

namespace internlm2 {

using PpoResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, clip_fraction, statistic, count

class PpoCall {
 public:
  static constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it saves
  PpoLoss a{};

  PpoCall(const char* op, const Tensor& x, const Tensor& old, const Tensor& target, const Tensor& mask, double clip) : x_(x) {
    check_cpu();
    a.acc = accumulator_tag(x);
    a.x = in_of(x);
    a.old = in_of(old);
    a.target = in_of(target);
    a.n = x.numel();
    INTERNLM2_CHECK_VALUE(mask.scalar_type() == torch::headeronly::ScalarType::Bool && mask.numel() == a.n, op, "mask",
                          "a bool for each of ", a.n, " entries, got ", mask.numel());
    a.mask = static_cast<const uint8_t*>(cdata(mask));
    a.clip = clip;
  }

  // chunks(begin, end) writes `sums` numbers for each chunk of elements to a.partial; a thread takes at least `grain` chunks.
  // total() then computes the results from them.
  template <typename Chunks, typename Total>
  PpoResults forward(int64_t sums, int64_t grain, const Chunks& chunks, const Total& total) {
    const auto scalar = [&] { return torch::stable::new_empty(x_, {}, accumulator_of(x_)); };
    Tensor loss = scalar(), clip_fraction = scalar(), statistic = scalar(), count = scalar();
    const int64_t n = (a.n + kPpoChunk - 1) / kPpoChunk;
    double few[256];  // a.partial of a small call, on the stack: an allocation would cost as much as its arithmetic
    OptTensor many;
    if (n * sums > 256) many = torch::stable::new_empty(x_, {n, sums}, torch::headeronly::ScalarType::Double);
    a.partial = many.has_value() ? static_cast<double*>(data(*many)) : few;
    a.loss = data(loss);
    a.clip_fraction = data(clip_fraction);
    a.statistic = data(statistic);
    a.count = data(count);
    for_rows(n, grain, chunks);
    total();
    return {loss, clip_fraction, statistic, count};
  }

  template <typename Elements> Tensor backward(const Tensor& dloss, const Tensor& count, const Elements& elements) {
    Tensor dx = empty_as(x_);
    a.dloss = cdata(dloss);
    a.count = const_cast<void*>(cdata(count));  // only read
    a.dx = out_of(dx);
    for_rows(a.n, kGrain, elements);
    return dx;
  }

 private:
  const Tensor& x_;
};

}  // namespace internlm2
