// Sampling: one read of the logits for the statistics of every block of kHeadBlock columns, and then work on few blocks.
//
// The statistics are those of linear_head.cpp, and so are the log-probabilities, bit for bit. A token is drawn by inverting the
// cumulative distribution at one uniform number: the blocks' masses say in which block it lies, and only that block is read
// again. Top-k, top-p and min-p keep tokens by a threshold on the logit. The largest logits of the blocks bound it from below,
// so that only blocks that reach the bound are read for it. Where penalties, bias or a mask change logits, they are changed in
// a copy of the row, which stays in the cache.
#include "../sample.h"

#include "sample_select.h"
#include "sample_statistics.h"
#include "simd/mask.h"
#include "simd/philox.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

using V = Vec<float>;
constexpr float kNone = -__builtin_huge_valf();  // the logit of a token that cannot be drawn
constexpr int64_t kLanes = V::size;

#if defined(CPU_CAPABILITY_AVX512)
VEC_INLINE __mmask16 bit_lanes(uint64_t bits) { return static_cast<__mmask16>(bits); }
VEC_INLINE uint64_t true_bits(const uint8_t* p) {
  const __m512i bytes = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(bytes, bytes);
}
#else
VEC_INLINE FloatMask bit_lanes(uint64_t bits) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits & 255)), each);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, each))};
}
VEC_INLINE uint64_t true_bits(const uint8_t* p) {
  const auto half = [](const uint8_t* q) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
  };
  return half(p) | uint64_t{half(p + 32)} << 32;
}
#endif

// Bits of an element of `counts`: 1 where the token is in `listed`, 2 for a token of the prompt, and 4 for each time that it
// was generated.
constexpr int32_t kListed = 1, kPrompt = 2, kGenerated = 4;

struct SampleScratch {
  // `blocks` is rounded up to kChunk; where a block has no logits, the largest is -inf and the sum is 0.
  float *max, *sum;  // [kSampleRows][blocks] the statistics of the logits at the row's temperature
  float *lane_max, *lane_sum, *top, *log_sum;  // as HeadRows::merge takes them: [blocks][kSampleRows], [kSampleRows]
  float *chosen, *largest;                     // [kSampleRows], [kSampleRows][top]: logits whose log-probability is reported
  float *changed_max, *changed_sum, *factors;  // [blocks] of the logits that are drawn from
  double* chunks;
  uint8_t* changed;  // [blocks] whether a block differs from the logits
  float* work;       // [blocks * kHeadBlock] the row with penalties, bias and mask
  int32_t* counts;   // [vocab]
  int64_t* listed;   // [vocab]
  float *values, *exponentials;  // [vocab] the candidates of top-k and top-p
  int32_t* keys;
  double *weights, *histogram;

  int64_t allocate(void* memory, const Sample& a) {
    Arena c(memory);
    const int64_t blocks = round_up((a.vocab + kHeadBlock - 1) / kHeadBlock, kChunk), all = blocks * kHeadBlock;
    const bool lists = a.token_ids.data != nullptr || a.bias_ids.data != nullptr;
    c.take(counts, lists ? a.vocab : 0);
    c.take(max, kSampleRows * blocks);
    c.take(sum, kSampleRows * blocks);
    c.take(lane_max, kSampleRows * blocks);
    c.take(lane_sum, kSampleRows * blocks);
    c.take(top, kSampleRows);
    c.take(log_sum, kSampleRows);
    c.take(chosen, kSampleRows);
    c.take(largest, kSampleRows * a.top);
    c.take(changed_max, blocks);
    c.take(changed_sum, blocks);
    c.take(factors, blocks);
    c.take(chunks, blocks / kChunk);
    c.take(changed, blocks);
    c.take(work, all);
    c.take(listed, lists ? a.vocab : 0);
    c.take(values, all + V::size);
    c.take(exponentials, all);
    c.take(keys, all);
    c.take(weights, all);
    c.take(histogram, kBuckets);
    return c.bytes;
  }
};

// One row of a call of sample_rows, which is lane `lane` of the merge.
template <typename T> class Row {
 public:
  Row(const Sample& a, int64_t row, int64_t lane, const SampleScratch& s)
      : a_(a), o_(a.options[row]), s_(s), row_(row), lane_(lane), blocks_((a.vocab + kHeadBlock - 1) / kHeadBlock),
        padded_(round_up(blocks_, kChunk)), logits_(static_cast<const T*>(a.logits) + row * a.stride),
        max_(s.max + lane * padded_), sum_(s.sum + lane * padded_),
        changes_(a.allowed_bits != nullptr || a.allowed_bytes != nullptr || a.biases > 0 ||
                 (a.history > 0 && o_.penalised())) {}

  // Chooses the token. The log-probabilities wait for the merged statistics (`report`).
  void choose() {
    a_.faults[row_] = SampleFault::none;
    if (!statistics()) return static_cast<void>(a_.faults[row_] = SampleFault::logits);
    if (a_.top > 0) find_largest();
    from_max_ = max_, from_sum_ = sum_;
    if (changes_ && !change()) return static_cast<void>(a_.faults[row_] = SampleFault::overflow);
    most_ = largest_of(from_max_);
    if (most_ == kNone) return static_cast<void>(a_.faults[row_] = SampleFault::nothing_left);
    const int64_t token = o_.greedy ? first_best() : draw();
    a_.tokens[row_] = token;
    s_.chosen[lane_] = logit(token);
  }

  void report() const {
    if (a_.faults[row_] != SampleFault::none) return;
    const double top = s_.top[lane_], log_sum = s_.log_sum[lane_];
    a_.logprobs[row_] = static_cast<float>((s_.chosen[lane_] - top) - log_sum);
    for (int64_t i = 0; i < a_.top; ++i) {
      a_.top_logprobs[row_ * a_.top + i] = static_cast<float>((s_.largest[lane_ * a_.top + i] - top) - log_sum);
    }
  }

 private:
  const Sample& a_;
  const SampleOptions& o_;
  const SampleScratch& s_;
  const int64_t row_, lane_, blocks_, padded_;
  const T* logits_;
  float *max_, *sum_;
  const bool changes_;
  float most_ = 0;                                         // the largest logit that may be drawn
  const float *from_max_ = nullptr, *from_sum_ = nullptr;  // the statistics of the blocks that are drawn from

  // ------------------------------------------------------------------------------------------------------- logits
  VEC_INLINE float logit(int64_t id) const { return to_acc(logits_[id]) * o_.inverse; }
  VEC_INLINE int64_t count_of(int64_t block) const { return lesser(kHeadBlock, a_.vocab - block * kHeadBlock); }

  // The logits of a block divided by the temperature, with -inf beyond the vocabulary, in `buffer` or where they are anyhow.
  VEC_INLINE const float* scaled(int64_t block, float* buffer) const {
    const T* from = logits_ + block * kHeadBlock;
    const int64_t count = count_of(block);
    if constexpr (std::is_same_v<T, float>) {
      if (count == kHeadBlock && o_.inverse == 1) return from;
    }
    const V inverse(o_.inverse);
    if (count == kHeadBlock) {
      for (int64_t j = 0; j < kHeadBlock; j += kLanes) (V::load(from + j) * inverse).store(buffer + j);
      return buffer;
    }
    for (int64_t j = 0; j < kHeadBlock; ++j) buffer[j] = j < count ? to_acc(from[j]) * o_.inverse : kNone;
    return buffer;
  }
  // The block that is drawn from: that of the copy, where there is one.
  VEC_INLINE const float* block_at(int64_t block, float* buffer) const {
    return changes_ ? s_.work + block * kHeadBlock : scaled(block, buffer);
  }

  HeadRows<float> head(LinearHead& h, float* max, float* sum) const {
    h.block_max = max;
    h.block_sum = sum;
    h.capacity = 1;
    return {h};
  }

  // The statistics of all blocks, and the copy where one is needed. False where a logit is NaN or +inf.
  bool statistics() {
    V fault(0.0f);
    int64_t b = 0;
    for (; (b + kTogether) * kHeadBlock <= a_.vocab; b += kTogether) {
      const T* from = logits_ + b * kHeadBlock;
      if (o_.inverse == 1) block_statistics<false>(from, 1, max_ + b, sum_ + b, fault);
      else block_statistics<true>(from, o_.inverse, max_ + b, sum_ + b, fault);
    }
    LinearHead h{};
    const HeadRows<float> rows = head(h, max_, sum_);
    alignas(64) float buffer[kHeadBlock];
    for (; b < blocks_; ++b) {
      rows.statistics(b, scaled(b, buffer), kHeadBlock, nullptr);
      fault = fault + V(sum_[b]);
    }
    if (changes_) {
      for (b = 0; b < blocks_; ++b) copy_allowed(b, scaled(b, buffer));
      for (; b < padded_; ++b) s_.changed[b] = 0;
      const int64_t end = blocks_ * kHeadBlock, whole = round_up(blocks_, kTogether) * kHeadBlock;
      for (int64_t i = end; i < whole; ++i) s_.work[i] = kNone;
    }
    pad(max_, sum_);
    const float total = fault.sum();
    return total == total;
  }

  VEC_INLINE void pad(float* max, float* sum) const {
    for (int64_t b = blocks_; b < padded_; ++b) max[b] = kNone, sum[b] = 0;
  }
  VEC_INLINE float largest_of(const float* all) const {
    V most(kNone);
    for (int64_t b = 0; b < padded_; b += kLanes) most = max(most, V::load(all + b));
    return largest(most);
  }

  // ------------------------------------------------------------------------------------- penalties, bias and mask
  uint64_t allowed_bits(int64_t block) const {
    const int64_t count = count_of(block);
    if (a_.allowed_bits != nullptr) {
      const uint32_t* words = a_.allowed_bits + row_ * a_.allowed_stride + block * 2;
      return words[0] | (count > 32 ? uint64_t{words[1]} << 32 : 0);
    }
    if (a_.allowed_bytes == nullptr) return ~uint64_t{0};
    const uint8_t* bytes = a_.allowed_bytes + row_ * a_.allowed_stride + block * kHeadBlock;
    if (count == kHeadBlock) return true_bits(bytes);
    uint8_t some[kHeadBlock] = {};
    std::memcpy(some, bytes, static_cast<size_t>(count));
    return true_bits(some);
  }

  VEC_INLINE void copy_allowed(int64_t block, const float* x) const {
    float* to = s_.work + block * kHeadBlock;
    uint64_t bits = allowed_bits(block);
    const int64_t count = count_of(block);
    const uint64_t all = count == kHeadBlock ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    s_.changed[block] = (bits & all) != all;
    for (int64_t j = 0; j < kHeadBlock; j += kLanes, bits >>= kLanes) {
      pick(bit_lanes(bits), V::load(x + j), V(kNone)).store(to + j);
    }
  }

  template <typename F> static VEC_INLINE void each_id(In ids, int64_t first, int64_t n, const F& f) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t id = ids.dtype == Dtype::i32 ? static_cast<const int32_t*>(ids.data)[first + i]
                                                 : static_cast<const int64_t*>(ids.data)[first + i];
      if (id >= 0) f(i, id);
    }
  }
  VEC_INLINE void list(int64_t id, int64_t& n) const {
    if ((s_.counts[id] & kListed) != 0) return;
    s_.counts[id] |= kListed;
    s_.listed[n++] = id;
    s_.work[id] = to_acc(logits_[id]);
  }

  // Applies bias and penalties to the copy, and computes the statistics of the blocks that differ from the logits. False where
  // a logit overflows.
  bool change() {
    int64_t n = 0;
    bool finite = true;
    each_id(a_.bias_ids, row_ * a_.biases, a_.biases, [&](int64_t i, int64_t id) {
      list(id, n);
      s_.work[id] += a_.bias_values[row_ * a_.biases + i];
    });
    if (o_.penalised()) {
      each_id(a_.token_ids, row_ * a_.history, a_.history, [&](int64_t i, int64_t id) {
        list(id, n);
        s_.counts[id] = i < o_.prompt ? s_.counts[id] | kPrompt : s_.counts[id] + kGenerated;
      });
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t id = s_.listed[i];
      const int32_t seen = s_.counts[id] & ~kListed, generated = seen / kGenerated;
      float z = s_.work[id];
      if (seen != 0) z = z > 0 ? z / o_.repetition : z * o_.repetition;
      if (generated > 0) {
        z = z - o_.frequency * static_cast<float>(generated);
        z = z - o_.presence;
      }
      const int64_t block = id / kHeadBlock;
      z = z * o_.inverse;
      const bool allowed = (allowed_bits(block) >> id % kHeadBlock & 1) != 0;
      finite = finite && (!allowed || z < -kNone);
      s_.work[id] = allowed ? z : kNone;
      s_.counts[id] = 0;
      s_.changed[block] = 1;
    }
    V fault;  // `finite` and `statistics` say it already
    for (int64_t b = 0; b < padded_; b += kTogether) {
      uint32_t any;
      std::memcpy(&any, s_.changed + b, kTogether);
      if (any != 0) {
        block_statistics<false>(s_.work + b * kHeadBlock, 1, s_.changed_max + b, s_.changed_sum + b, fault);
      } else {
        std::memcpy(s_.changed_max + b, max_ + b, kTogether * sizeof(float));
        std::memcpy(s_.changed_sum + b, sum_ + b, kTogether * sizeof(float));
      }
    }
    from_max_ = s_.changed_max, from_sum_ = s_.changed_sum;
    return finite;
  }

  // ------------------------------------------------------------------------------------------------------- choice
  int64_t first_best() const {
    if (a_.filtered != nullptr) a_.filtered[row_] = 0;
    alignas(64) float buffer[kHeadBlock];
    int64_t b = 0;
    while (from_max_[b] != most_) ++b;
    return b * kHeadBlock + HeadRows<float>::first_equal(block_at(b, buffer), most_);
  }

  int64_t draw() {
    const float least = threshold();
    alignas(64) float buffer[kHeadBlock];
    if (least > kNone) keep(least);
    const Masses masses(from_max_, from_sum_, blocks_, most_, s_.factors, s_.chunks);
    const double target = uniform() * masses.total();
    double at;
    const int64_t block = masses.find(target, at);
    const float* x = block_at(block, buffer);
    alignas(64) float e[kHeadBlock];
    for (int64_t j = 0; j < kHeadBlock; j += kLanes) {
      const V z = V::load(x + j);
      exp(pick(less(z, V(least)), V(kNone), z) - V(from_max_[block])).store(e + j);
    }
    int64_t found = 0;
    for (int64_t j = 0; j < kHeadBlock; ++j) {
      if (e[j] == 0) continue;
      found = j;
      at += e[j] * masses.factor(block);
      if (at > target) break;
    }
    if (a_.filtered != nullptr) {
      a_.filtered[row_] = static_cast<float>((static_cast<double>(x[found]) - most_) - log_of(masses.total()));
    }
    return block * kHeadBlock + found;
  }

  // A uniform number in [0, 1) of 53 random bits, which depends on seed and position alone.
  double uniform() const {
    const PhiloxKey key(static_cast<uint32_t>(o_.seed), static_cast<uint32_t>(o_.seed >> 32));
    Words a, b;
    philox(key, o_.position, 0, 0, a, b);
    alignas(64) uint32_t words[sizeof(Words) / 4];
    std::memcpy(words, &a, sizeof words);
    return static_cast<double>((uint64_t{words[0]} << 32 | words[1]) >> 11) * 0x1p-53;
  }

  // The smallest logit that top-k, top-p and min-p keep; -inf where none of them is in use.
  float threshold() const {
    float least = kNone;
    if (o_.min_p > 0) {
      const double limit = most_ + log_of(o_.min_p);
      least = static_cast<float>(limit);
      if (least < limit) least = ::nextafterf(least, most_);
    }
    const bool by_rank = o_.top_k > 0 && o_.top_k < a_.vocab, by_mass = o_.top_p < 1;
    if (!by_rank && !by_mass) return least;
    double total = 0;
    if (!by_rank) total = Masses(from_max_, from_sum_, blocks_, most_, s_.factors, s_.chunks).total();
    const float bound = by_rank ? bound_of_rank(o_.top_k, from_max_) : bound_of_mass(total);
    int64_t n = gather(bound);
    if (by_rank) {
      const float kept = n > o_.top_k ? boundary_of(n, static_cast<double>(o_.top_k), Ones()) : bound;
      least = kept > least ? kept : least;
      int64_t m = 0;
      for (int64_t i = 0; i < n; ++i) {
        s_.values[m] = s_.values[i];
        m += s_.values[i] >= kept;
      }
      n = m;
    }
    if (!by_mass) return least;
    for_vectors<V, Single>(n, [&](int64_t i, auto lanes) VEC_LAMBDA {
      store(s_.exponentials + i, exp(load<V>(s_.values + i, lanes) - V(most_)), lanes);
    });
    if (by_rank) {
      for (int64_t i = 0; i < n; ++i) total += s_.exponentials[i];
    }
    const float* e = s_.exponentials;
    const float kept = boundary_of(n, o_.top_p * total, [e](int64_t i) { return static_cast<double>(e[i]); });
    return kept > least ? kept : least;
  }
  template <typename W> float boundary_of(int64_t n, double target, const W& weight) const {
    return boundary(s_.values, n, most_, target, weight, s_.histogram, s_.keys, s_.weights);
  }

  // A number that at least k logits reach: the k-th of the largest logits of the blocks, -inf where there are fewer blocks.
  float bound_of_rank(int64_t k, const float* max) const {
    int64_t n = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      if (max[b] > kNone) s_.values[n++] = max[b];
    }
    if (n < k) return kNone;
    return boundary(s_.values, n, largest_of(max), static_cast<double>(k), Ones(), s_.histogram, s_.keys, s_.weights);
  }
  // A number below which lies less than 1 - top_p of the mass, since each of the tokens below it weighs less than
  // exp(-distance). The 0.01 outweighs rounding.
  float bound_of_mass(double total) const {
    const double distance = log_of(static_cast<double>(a_.vocab) / ((1 - o_.top_p) * total)) + 0.01;
    return most_ - static_cast<float>(distance > 0 ? distance : 0);
  }

  // Copies the finite logits >= `bound` to s_.values and returns their number.
  int64_t gather(float bound) const {
    alignas(64) float buffer[kHeadBlock];
    const float least = bound > kLeast ? bound : kLeast;
    int64_t n = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      if (from_max_[b] < least) continue;
      const float* x = block_at(b, buffer);
      for (int64_t j = 0; j < kHeadBlock; j += kLanes) n += store_kept(s_.values + n, V::load(x + j), V(least));
    }
    return n;
  }

  // The statistics of the tokens that the filters keep.
  void keep(float least) {
    alignas(64) float buffer[kHeadBlock], kept[kTogether * kHeadBlock];
    V fault;
    for (int64_t first = 0; first < padded_; first += kTogether) {
      bool any = false;
      for (int64_t b = first; b < first + kTogether; ++b) any = any || from_max_[b] >= least;
      if (!any) {
        for (int64_t b = first; b < first + kTogether; ++b) s_.changed_max[b] = kNone, s_.changed_sum[b] = 0;
        continue;
      }
      for (int64_t b = first; b < first + kTogether; ++b) {
        float* to = kept + (b - first) * kHeadBlock;
        const bool reaches = from_max_[b] >= least;
        const float* x = reaches ? block_at(b, buffer) : buffer;
        for (int64_t j = 0; j < kHeadBlock; j += kLanes) {
          const V z = reaches ? V::load(x + j) : V(kNone);
          pick(less(z, V(least)), V(kNone), z).store(to + j);
        }
      }
      block_statistics<false>(kept, 1, s_.changed_max + first, s_.changed_sum + first, fault);
    }
    from_max_ = s_.changed_max, from_sum_ = s_.changed_sum;
  }

  void find_largest() const {
    const float bound = bound_of_rank(a_.top, max_);
    Largest found(s_.largest + lane_ * a_.top, a_.top_ids + row_ * a_.top, a_.top);
    alignas(64) float buffer[kHeadBlock];
    for (int64_t b = 0; b < blocks_; ++b) {
      if (max_[b] < bound) continue;
      const float* x = scaled(b, buffer);
      for (int64_t j = 0, count = count_of(b); j < count; ++j) {
        if (x[j] >= bound) found.offer(x[j], b * kHeadBlock + j);
      }
    }
  }
};

// Merges the statistics of n rows with the code of the heads, whose lanes are rows.
void merge(const Sample& a, int64_t n, const SampleScratch& s) {
  const int64_t blocks = (a.vocab + kHeadBlock - 1) / kHeadBlock, stride = round_up(blocks, kChunk);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t t = 0; t < n; ++t) {
      s.lane_max[b * kSampleRows + t] = s.max[t * stride + b];
      s.lane_sum[b * kSampleRows + t] = s.sum[t * stride + b];
    }
  }
  LinearHead h{};
  h.vocab = a.vocab;
  h.rows = n;
  h.capacity = kSampleRows;
  h.block_max = s.lane_max;
  h.block_sum = s.lane_sum;
  h.top = s.top;
  h.log_sum = s.log_sum;
  HeadRows<float>{h}.merge(0, n);
}

template <typename T> void sample(const Sample& a, int64_t begin, int64_t end, void* scratch) {
  SampleScratch s;
  s.allocate(scratch, a);
  for (int64_t row = begin; row < end; ++row) Row<T>(a, row, row - begin, s).choose();
  merge(a, end - begin, s);
  for (int64_t row = begin; row < end; ++row) Row<T>(a, row, row - begin, s).report();
}

}  // namespace

int64_t sample_scratch(const Sample& a) { return SampleScratch().allocate(nullptr, a); }

void sample_prepare(const Sample& a, void* scratch) {
  SampleScratch s;
  s.allocate(scratch, a);
  if (a.token_ids.data != nullptr || a.bias_ids.data != nullptr) {
    std::memset(s.counts, 0, static_cast<size_t>(a.vocab) * sizeof(int32_t));
  }
}

void sample_rows(const Sample& a, int64_t begin, int64_t end, void* scratch) {
  switch (a.dtype) {
    case Dtype::f32: return sample<float>(a, begin, end, scratch);
    case Dtype::bf16: return sample<bf16>(a, begin, end, scratch);
    case Dtype::f16: return sample<f16>(a, begin, end, scratch);
    default: return;
  }
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
