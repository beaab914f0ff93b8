#include "../rms_norm.h"

#include <cmath>

#include "dispatch.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

// Returns the sum of h^2, where h is x, or with kResidual x + residual, which is also written to `h`.
template <typename T, bool kResidual>
VEC_INLINE acc_t<T> squares(const T* x, const T* residual, T* h, int64_t cols) {
  using V = Vec<acc_t<T>>;
  Two<V> sums[2];  // four independent chains hide the latency of the additions
  for_unrolled<2, V, T>(cols, [&](int64_t i, auto n, int u) VEC_LAMBDA {
    auto value = load<V>(x + i, n);
    if constexpr (kResidual) {  // h = round(x + residual); the sum takes the rounded h
      value = rounded_to<T>(value + load<V>(residual + i, n));
      store_exact(h + i, value, n);
    }
    add_to(sums[u], value, value);
  });
  const Two<V> sum = sums[0] + sums[1];
  return (sum.a + sum.b).sum();
}

template <typename T, typename W, bool kResidual, bool kHf>
void fwd_rows(const RmsNormFwd& a, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  const auto* weight = static_cast<const W*>(a.weight);
  const int64_t cols = a.cols;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + a.x_rows.offset(row);
    const T* residual = kResidual ? static_cast<const T*>(a.residual) + a.residual_rows.offset(row) : nullptr;
    T* out = kResidual ? static_cast<T*>(a.h) + row * cols : nullptr;
    const Acc total = squares<T, kResidual>(x, residual, out, cols);
    const Acc rstd = Acc(1) / std::sqrt(total / static_cast<Acc>(cols) + static_cast<Acc>(a.eps));
    static_cast<Acc*>(a.rstd)[row] = rstd;
    const T* h = kResidual ? out : x;
    const int64_t next = row + 1 < end ? row + 1 : row;
    const T* next_x = static_cast<const T*>(a.x) + a.x_rows.offset(next);
    const T* next_residual = kResidual ? static_cast<const T*>(a.residual) + a.residual_rows.offset(next) : nullptr;
    T* y = static_cast<T*>(a.y) + row * cols;
    const V scale(rstd);
    for_vectors<V, T>(cols, [&](int64_t i, auto n) VEC_LAMBDA {
      prefetch<V>(next_x + i, n);  // while this row is written, the next one is read
      if constexpr (kResidual) prefetch<V>(next_residual + i, n);
      auto x_hat = load<V>(h + i, n) * scale;
      if constexpr (kHf) x_hat = rounded_to<T>(x_hat);
      store(y + i, x_hat * load<V>(weight + i, n), n);
    });
  }
}

// How many rows bwd_rows computes together, with one addition of their sum to `partial`. The bits of dx do not depend on it.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTogether = 4;
#else
constexpr int kTogether = 2;  // AVX2 has half as many registers
#endif

// With x_hat = h * rstd and g = dy * weight, writes dx = rstd * (g - x_hat * mean(g * x_hat)) + dresidual of kRows rows and
// adds their dy * x_hat to `partial`. The lanes of `partial` stay in the order of Both<T> (simd/vec.h), in which dweight_typed
// reads them, too.
template <int kRows, typename T, typename W, bool kHf>
void bwd_rows(const RmsNormBwd& a, int64_t row, acc_t<T>* partial) {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  const int64_t cols = a.cols;
  const auto* weight = static_cast<const W*>(a.weight);
  const T *dy[kRows], *h[kRows];
  V scale[kRows];
  Two<V> sums[kRows];
  for (int r = 0; r < kRows; ++r) {
    dy[r] = static_cast<const T*>(a.dy) + a.dy_rows.offset(row + r);
    h[r] = static_cast<const T*>(a.h) + a.h_rows.offset(row + r);
    scale[r] = V(static_cast<const Acc*>(a.rstd)[row + r]);
  }
  for_vectors<V, T>(cols, [&](int64_t i, auto n) VEC_LAMBDA {
    const auto w = load<V>(weight + i, n);
    decltype(load<V>(weight + i, n)) dweight;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto d = load<V>(dy[r] + i, n), x_hat = load<V>(h[r] + i, n) * scale[r];
      const auto product = d * x_hat;
      add_to(sums[r], product, w);
      const auto term = kHf ? d * rounded_to<T>(x_hat) : product;
      dweight = r == 0 ? term : dweight + term;
    }
    if (partial != nullptr) store_partial(partial + i, dweight + load_partial<V>(partial + i, n), n);
  });
  for (int r = 0; r < kRows; ++r) {
    const V mean((sums[r].a + sums[r].b).sum() / static_cast<Acc>(cols));
    const T* dresidual = a.dresidual ? static_cast<const T*>(a.dresidual) + a.dresidual_rows.offset(row + r) : nullptr;
    T* dx = static_cast<T*>(a.dx) + (row + r) * cols;
    const int64_t next = row + r + kRows < a.h_rows.count() ? row + r + kRows : row + r;
    const T* next_dy = static_cast<const T*>(a.dy) + a.dy_rows.offset(next);
    const T* next_h = static_cast<const T*>(a.h) + a.h_rows.offset(next);
    for_vectors<V, T>(cols, [&](int64_t i, auto n) VEC_LAMBDA {
      prefetch<V>(next_dy + i, n);
      prefetch<V>(next_h + i, n);
      const auto g = load<V>(dy[r] + i, n) * load<V>(weight + i, n), x_hat = load<V>(h[r] + i, n) * scale[r];
      auto out = fnma(x_hat, mean, g) * scale[r];
      if (dresidual != nullptr) out = out + load<V>(dresidual + i, n);
      store(dx + i, out, n);
    });
  }
}

template <typename T, typename W, bool kHf>
void bwd_chunks(const RmsNormBwd& a, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t rows = a.h_rows.count();
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Acc* partial = a.dweight ? static_cast<Acc*>(a.partial) + chunk * a.cols : nullptr;
    if (partial != nullptr) std::memset(partial, 0, sizeof(Acc) * static_cast<size_t>(a.cols));
    int64_t row = chunk * a.rows_per_chunk;
    const int64_t last = row + a.rows_per_chunk < rows ? row + a.rows_per_chunk : rows;
    for (; row + kTogether <= last; row += kTogether) bwd_rows<kTogether, T, W, kHf>(a, row, partial);
    for (; row < last; ++row) bwd_rows<1, T, W, kHf>(a, row, partial);
  }
}

template <typename T, typename W>
void fwd_typed(const RmsNormFwd& a, int64_t begin, int64_t end) {
  if (a.residual) return a.hf ? fwd_rows<T, W, true, true>(a, begin, end) : fwd_rows<T, W, true, false>(a, begin, end);
  return a.hf ? fwd_rows<T, W, false, true>(a, begin, end) : fwd_rows<T, W, false, false>(a, begin, end);
}

template <typename T, typename W>
void dweight_typed(const RmsNormBwd& a, int64_t chunks, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  for_vectors<V, T>(end - begin, [&](int64_t i, auto n) VEC_LAMBDA {
    const Acc* column = static_cast<const Acc*>(a.partial) + begin + i;
    decltype(load_partial<V>(column, n)) sum;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum = sum + load_partial<V>(column + chunk * a.cols, n);
    store(static_cast<W*>(a.dweight) + begin + i, sum, n);
  });
}

}  // namespace

void rms_norm_fwd(const RmsNormFwd& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, {
    if (a.weight_dtype == a.dtype) return fwd_typed<T, T>(a, begin, end);
    if constexpr (sizeof(T) == 2) return fwd_typed<T, float>(a, begin, end);
  })
}

void rms_norm_bwd(const RmsNormBwd& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, {
    if (a.weight_dtype == a.dtype) {
      return a.hf ? bwd_chunks<T, T, true>(a, begin, end) : bwd_chunks<T, T, false>(a, begin, end);
    }
    if constexpr (sizeof(T) == 2) {
      return a.hf ? bwd_chunks<T, float, true>(a, begin, end) : bwd_chunks<T, float, false>(a, begin, end);
    }
  })
}

void rms_norm_bwd_dweight(const RmsNormBwd& a, int64_t chunks, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, {
    if (a.weight_dtype == a.dtype) return dweight_typed<T, T>(a, chunks, begin, end);
    if constexpr (sizeof(T) == 2) return dweight_typed<T, float>(a, chunks, begin, end);
  })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
