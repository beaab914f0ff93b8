// What sample.cpp selects with: the threshold that keeps the largest values up to a given weight, and the block and lane in
// which a cumulative sum passes a target. All sums are in double and in an order that no instruction set changes.
#pragma once
#include "gemm/arena.h"
#include "simd/math.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr int64_t kBuckets = 2048;  // of the histogram of `boundary`, each 1 / kBucketsPerUnit wide
constexpr float kBucketsPerUnit = 64;
constexpr int64_t kChunk = 64;      // blocks that `Masses` adds up first

struct Ones {
  VEC_INLINE double operator()(int64_t) const { return 1; }
};

// The bits of a float as an integer that rises with it. -0 and 0 are equal floats but not equal integers, so -0 becomes 0.
VEC_INLINE int32_t ordered(float x) {
  int32_t bits;
  x += 0.0f;
  std::memcpy(&bits, &x, 4);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
VEC_INLINE float from_ordered(int32_t key) {
  const int32_t bits = key < 0 ? key ^ 0x7fffffff : key;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Stores the lanes of x that are at least `least`, one after the other, and returns their number. A whole vector is written.
#if defined(CPU_CAPABILITY_AVX512)
VEC_INLINE int64_t store_kept(float* to, Vec<float> x, Vec<float> least) {
  const __mmask16 kept = _mm512_cmp_ps_mask(x.v, least.v, _CMP_GE_OQ);
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(kept, x.v));  // compressing in a register: to memory it is microcode on Zen 4
  return __builtin_popcount(kept);
}
VEC_INLINE void store_buckets(int32_t* to, Vec<float> at, int n) {
  _mm512_mask_storeu_epi32(to, Vec<float>::first(n), _mm512_cvttps_epi32(at.v));
}
VEC_INLINE void store_buckets(int32_t* to, Vec<float> at, All) { _mm512_storeu_si512(to, _mm512_cvttps_epi32(at.v)); }
#else
VEC_INLINE int64_t store_kept(float* to, Vec<float> x, Vec<float> least) {
  alignas(32) float lanes[Vec<float>::size];
  x.store(lanes);
  int64_t n = 0;
  for (unsigned kept = static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x.v, least.v, _CMP_GE_OQ))); kept != 0;
       kept &= kept - 1) {
    to[n++] = lanes[__builtin_ctz(kept)];
  }
  return n;
}
VEC_INLINE void store_buckets(int32_t* to, Vec<float> at, int n) {
  _mm256_maskstore_epi32(to, Vec<float>::first(n), _mm256_cvttps_epi32(at.v));
}
VEC_INLINE void store_buckets(int32_t* to, Vec<float> at, All) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_cvttps_epi32(at.v));
}
#endif

// The largest t for which the values >= t together weigh at least `target`; the smallest value where all of them weigh less.
// The values are finite and at most `most`; value i weighs weight(i). A histogram over the distance from `most` finds the bucket
// in which t lies, and bisection over the bits of its values finds t itself. `histogram` has kBuckets elements, and `keys` and
// `weights` have n.
template <typename W>
float boundary(const float* values, int64_t n, float most, double target, const W& weight, double* histogram, int32_t* keys,
               double* weights) {
  using V = Vec<float>;
  for_vectors<V, Single>(n, [&](int64_t i, auto lanes) VEC_LAMBDA {
    const V at = (V(most) - load<V>(values + i, lanes)) * V(kBucketsPerUnit);
    store_buckets(keys + i, min(at, V(static_cast<float>(kBuckets - 1))), lanes);
  });
  std::memset(histogram, 0, kBuckets * sizeof(double));
  for (int64_t i = 0; i < n; ++i) histogram[keys[i]] += weight(i);
  int64_t last = kBuckets - 1, bucket = 0, m = 0;
  double above = 0;
  while (last > 0 && histogram[last] == 0) --last;
  while (bucket < last && above + histogram[bucket] < target) above += histogram[bucket++];
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < n; ++i) {
    if (keys[i] != bucket) continue;
    const int32_t key = ordered(values[i]);
    low = key < low ? key : low;
    high = key > high ? key : high;
    keys[m] = key;
    weights[m++] = weight(i);
  }
  if (m == 0) return most;  // every weight is 0
  while (low < high) {  // t is in [low, high]
    const int32_t middle = static_cast<int32_t>(low + (int64_t{high} - low + 1) / 2);
    double sum = above;
    for (int64_t i = 0; i < m; ++i) sum += keys[i] >= middle ? weights[i] : 0;
    if (sum >= target) low = middle;
    else high = middle - 1;
  }
  return from_ordered(low);
}

// The probability masses of the blocks of a row, relative to exp(most): mass(b) = sum[b] * exp(max[b] - most).
class Masses {
 public:
  // `factors` has room for the blocks, rounded up to kChunk, and `chunks` for one number per chunk.
  Masses(const float* max, const float* sum, int64_t blocks, float most, float* factors, double* chunks)
      : sum_(sum), factors_(factors), chunks_(chunks), blocks_(blocks) {
    using V = Vec<float>;
    for_vectors<V, Single>(blocks, [&](int64_t b, auto n) VEC_LAMBDA {
      store(factors + b, exp(load<V>(max + b, n) - V(most)), n);
    });
    for (int64_t first = 0; first < blocks; first += kChunk) {
      const int64_t end = lesser(first + kChunk, blocks);
      double parts[8] = {};
      int64_t b = first;
      for (; b + 8 <= end; b += 8) {
        for (int i = 0; i < 8; ++i) parts[i] += mass(b + i);
      }
      for (int i = 0; b < end; ++b, ++i) parts[i] += mass(b);
      const double chunk = ((parts[0] + parts[4]) + (parts[1] + parts[5])) + ((parts[2] + parts[6]) + (parts[3] + parts[7]));
      chunks[first / kChunk] = chunk;
      total_ += chunk;
    }
  }
  double total() const { return total_; }
  double factor(int64_t b) const { return factors_[b]; }

  // The first block whose cumulative mass exceeds `target`; `before` becomes the mass before it. Rounding may put the target
  // behind the last mass: then it is the last block that has any.
  int64_t find(double target, double& before) const {
    before = 0;
    int64_t chunk = 0, found = 0;
    const int64_t chunks = (blocks_ + kChunk - 1) / kChunk;
    double at = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      if (chunks_[c] == 0) continue;
      chunk = c;
      before = at;
      if (at + chunks_[c] > target) break;
      at += chunks_[c];
    }
    at = before;
    for (int64_t b = chunk * kChunk, end = lesser(b + kChunk, blocks_); b < end; ++b) {
      if (mass(b) == 0) continue;
      found = b;
      before = at;
      if (at + mass(b) > target) break;
      at += mass(b);
    }
    return found;
  }

 private:
  const float* sum_;
  float* factors_;
  double* chunks_;
  int64_t blocks_;
  double total_ = 0;

  VEC_INLINE double mass(int64_t b) const { return static_cast<double>(sum_[b]) * factors_[b]; }
};

// The n largest values with their ids in falling order, of equal ones the lower ids. They are given in rising order of the ids.
class Largest {
 public:
  Largest(float* values, int64_t* ids, int64_t n) : values_(values), ids_(ids), n_(n) {}
  VEC_INLINE void offer(float x, int64_t id) {
    if (count_ == n_ && !(x > values_[n_ - 1])) return;
    int64_t at = count_ < n_ ? count_++ : n_ - 1;
    for (; at > 0 && x > values_[at - 1]; --at) {
      values_[at] = values_[at - 1];
      ids_[at] = ids_[at - 1];
    }
    values_[at] = x;
    ids_[at] = id;
  }

 private:
  float* values_;
  int64_t* ids_;
  int64_t n_, count_ = 0;
};

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
