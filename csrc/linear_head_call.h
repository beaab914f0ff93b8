// One call of a head over a vocabulary (linear_head.h): allocates its memory, divides the tokens into chunks and runs the steps
// of each chunk on threads.
#pragma once
#include <cstring>

#include "linear_head.h"
#include "loss_args.h"
#include "threads.h"

namespace internlm2 {

inline void clear(const Tensor& t) {
  if (t.numel() > 0) std::memset(data(t), 0, static_cast<size_t>(t.numel()) * t.element_size());
}

class HeadCall {
 public:
  LinearHead a{};

  // Sets the arguments that forward and backward share. The caller sets the others that it needs in `a` before prepare().
  HeadCall(const Tensor& hidden, const Tensor& weight, double scale, double softcap, HeadStore store)
      : hidden_(hidden), weight_(weight), tokens_(hidden.size(0)) {
    a.dtype = dtype_of(hidden);
    a.hidden_stride = hidden.stride(0);
    a.weight_stride = weight.stride(0);
    a.weight = cdata(weight);
    a.d = hidden.size(1);
    a.vocab = weight.size(0);
    a.scale = scale;
    a.softcap = softcap;
    a.store = store;
    a.dhidden_dtype = a.dweight_dtype = a.dtype;
  }

  int64_t tokens() const { return tokens_; }
  bool wide() const { return a.dtype == Dtype::f64; }
  int64_t acc_size() const { return wide() ? 8 : 4; }
  bool one_chunk() {
    const HeadSizes sizes = INTERNLM2_CPU_MATRIX(linear_head_sizes, a);
    return tokens_ <= most_rows(sizes);
  }
  // A fresh tensor of the accumulator's dtype.
  Tensor numbers(std::initializer_list<int64_t> sizes) const {
    return torch::stable::new_empty(hidden_, {sizes.begin(), sizes.size()}, accumulator_of(hidden_));
  }
  void* take(int64_t bytes) {
    kept_.push_back(torch::stable::new_empty(hidden_, {bytes}, torch::headeronly::ScalarType::Char));
    return data(kept_.back());
  }
  void* statistic(int64_t size) { return take(blocks() * a.capacity * size); }
  // Copy the lse of a chunk to and from its part of lse [tokens, 2]: the largest logit, and log(sum of exp(l - largest)).
  void put_lse(const Numbers& lse, int64_t first) const {
    const Numbers top(a.top, wide()), log_sum(a.log_sum, wide());
    for (int64_t t = 0; t < a.rows; ++t) {
      lse.set(2 * (first + t), top.get(t));
      lse.set(2 * (first + t) + 1, log_sum.get(t));
    }
  }
  void get_lse(const Numbers& lse, int64_t first) const {
    const Numbers top(a.top, wide()), log_sum(a.log_sum, wide());
    for (int64_t t = 0; t < a.rows; ++t) {
      top.set(t, lse.get(2 * (first + t)));
      log_sum.set(t, lse.get(2 * (first + t) + 1));
    }
  }
  void* row_numbers() { return take(a.capacity * acc_size()); }

  // Chooses the size of the chunks and allocates their memory. Before the call a.dweight, a.dhidden and a.dweight_sum must be
  // set, to null where they are not needed.
  void prepare() {
    HeadSizes sizes = INTERNLM2_CPU_MATRIX(linear_head_sizes, a);
    const int64_t most = most_rows(sizes), chunks = std::max<int64_t>(1, (tokens_ + most - 1) / most);
    chunk_ = std::min(most, ((tokens_ + chunks - 1) / chunks + 11) / 12 * 12);  // nearly equal chunks, multiples of 12 rows
    a.rows = chunk_;
    a.capacity = (chunk_ + 15) / 16 * 16;
    sizes = INTERNLM2_CPU_MATRIX(linear_head_sizes, a);
    const bool serial = static_cast<double>(tokens_) * a.vocab * a.d < kSerial;
    workers_ = serial ? 1 : workers_for(std::max(blocks(), chunk_));
    a.top = row_numbers();
    a.log_sum = row_numbers();
    a.hidden_rows = take(sizes.hidden_rows);
    if (wants_dweight()) a.hidden_steps = take(sizes.hidden_steps);
    if (a.store != HeadStore::none) a.scores = take(sizes.scores);
    column_panels_ = sizes.column_panels;
    scratch_bytes_ = sizes.scratch;
    scratch_ = static_cast<char*>(take(workers_ * sizes.scratch));
    if (a.store == HeadStore::gradient) return;
    a.block_max = statistic(acc_size());
    a.block_sum = statistic(acc_size());
    a.label_logit = row_numbers();
  }

  // Computes all chunks. For the chunk that begins at token `first`, at(first) sets the pointers to labels and results, and
  // merged(first, rows) is called when its lse and other statistics are complete, before the gradients.
  template <typename At, typename F> void run(const At& at, const F& merged) {
    for (int64_t first = 0; first < tokens_; first += chunk_) {
      a.rows = std::min(chunk_, tokens_ - first);
      a.hidden = static_cast<const char*>(cdata(hidden_)) + first * a.hidden_stride * hidden_.element_size();
      a.fresh = first == 0;
      a.last = first + a.rows == tokens_;
      at(first);
      step(HeadStep::pack, (a.rows + kHeadPackRows - 1) / kHeadPackRows + (wants_dweight() ? column_panels_ : 0));
      step(HeadStep::scores, blocks());
      if (a.store != HeadStore::gradient) {
        step(HeadStep::merge, (a.rows + kHeadMergeRows - 1) / kHeadMergeRows);
        merged(first, a.rows);
      }
      if (a.store == HeadStore::none) continue;
      step(HeadStep::dweight, (a.vocab + kHeadSpan - 1) / kHeadSpan);
      if (a.dhidden != nullptr && a.d > 0) step(HeadStep::dhidden, cut_dhidden());
    }
  }

 private:
  static constexpr double kSerial = 1 << 20;  // multiplications below which more threads cost more than they save

  const Tensor &hidden_, &weight_;
  int64_t tokens_, chunk_ = 0, workers_ = 1, scratch_bytes_ = 0, column_panels_ = 0;
  char* scratch_ = nullptr;
  std::vector<Tensor> kept_;

  int64_t blocks() const { return (a.vocab + kHeadBlock - 1) / kHeadBlock; }
  bool wants_dweight() const { return a.dweight != nullptr || a.dweight_sum != nullptr; }
  int64_t most_rows(const HeadSizes& sizes) const {
    return a.store == HeadStore::none ? sizes.most_rows_alone : sizes.most_rows;
  }
  void step(HeadStep which, int64_t tiles) const {
    for_tiles(tiles, std::min(workers_, tiles), [&](int64_t tile, int64_t worker) {
      INTERNLM2_CPU_MATRIX(linear_head_step, a, which, tile, scratch_ + worker * scratch_bytes_);
    });
  }

  // Distributes columns of dhidden over the threads, and rows too where there are fewer column tiles than threads. Returns the
  // number of tiles.
  int64_t cut_dhidden() {
    const auto part = [](int64_t n, int64_t most, int64_t wanted, int64_t least) {
      const int64_t cuts = std::max((n + most - 1) / most, std::min(wanted, n / least));
      const int64_t each = ((n + cuts - 1) / std::max<int64_t>(cuts, 1) + least - 1) / least * least;
      return std::min(each, most);
    };
    a.dhidden_columns = part(a.d, kHeadColumns, workers_, 64);
    const int64_t across = (a.d + a.dhidden_columns - 1) / a.dhidden_columns;
    a.dhidden_rows = part(a.rows, a.rows, (workers_ + across - 1) / across, 48);
    return across * ((a.rows + a.dhidden_rows - 1) / a.dhidden_rows);
  }
};

// Allocates dhidden and dweight in the dtypes of hidden and weight. Chunks add to dweight in its own memory where its dtype is
// the accumulator's. Otherwise, where there is more than one chunk, they add to a separate accumulator (a.dweight_sum).
class HeadGradients {
 public:
  HeadGradients(HeadCall& call, const Tensor& hidden, const Tensor& weight, bool needs_dhidden, bool needs_dweight)
      : call_(call),
        dhidden_(torch::stable::new_empty(hidden, {needs_dhidden ? hidden.size(0) : 0, hidden.size(1)})),
        dweight_(torch::stable::new_empty(weight, {needs_dweight ? weight.size(0) : 0, weight.size(1)})) {
    LinearHead& a = call.a;
    if (needs_dhidden) a.dhidden = data(dhidden_);
    if (!needs_dweight) return;
    if (dweight_.scalar_type() == accumulator_of(weight)) {
      a.dweight_sum = data(dweight_);
      return;
    }
    a.dweight = data(dweight_);
    if (call.one_chunk()) return;
    sum_.emplace(call.numbers({weight.size(0), weight.size(1)}));
    a.dweight_sum = data(*sum_);
  }
  void at(int64_t first) const {
    if (call_.a.dhidden == nullptr) return;
    call_.a.dhidden = static_cast<char*>(data(dhidden_)) + first * call_.a.d * dhidden_.element_size();
  }
  std::tuple<Tensor, Tensor> done() const {
    if (call_.tokens() == 0) clear(dweight_);
    return {dhidden_, dweight_};
  }

 private:
  HeadCall& call_;
  Tensor dhidden_, dweight_;
  OptTensor sum_;
};

}  // namespace internlm2
