#include "../rms_norm.h"

#include <cmath>

#include "dispatch.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

constexpr int kUnroll = 4;  // independent sums, to hide the latency of the additions

template <typename T, typename W, bool kResidual, bool kHf>
void fwd_rows(const RmsNormFwd& a, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  const auto* weight = static_cast<const W*>(a.weight);
  const int64_t cols = a.cols, step = kUnroll * V::size, whole = cols - cols % step;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + a.x_rows.offset(row);
    T* y = static_cast<T*>(a.y) + row * cols;
    const T* h = x;
    V sums[kUnroll];
    if constexpr (kResidual) {
      const T* residual = static_cast<const T*>(a.residual) + a.residual_rows.offset(row);
      T* out = static_cast<T*>(a.h) + row * cols;
      const auto add = [&](int64_t i, auto n, V& sum) {  // h = round(x + residual); the sum takes the rounded h
        const V value = (load<V>(x + i, n) + load<V>(residual + i, n)).template rounded_to<T>();
        store(out + i, value, n);
        sum = fma(value, value, sum);
      };
      for (int64_t i = 0; i < whole; i += step) {
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u) add(i + u * V::size, All{}, sums[u]);
      }
      for_vectors<V>(cols - whole, [&](int64_t i, auto n) { add(whole + i, n, sums[0]); });
      h = out;
    } else {
      for (int64_t i = 0; i < whole; i += step) {
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u) {
          const V value = V::load(x + i + u * V::size);
          sums[u] = fma(value, value, sums[u]);
        }
      }
      for_vectors<V>(cols - whole, [&](int64_t i, auto n) {
        const V value = load<V>(x + whole + i, n);
        sums[0] = fma(value, value, sums[0]);
      });
    }
    const Acc total = ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
    const Acc rstd = Acc(1) / std::sqrt(total / static_cast<Acc>(cols) + static_cast<Acc>(a.eps));
    static_cast<Acc*>(a.rstd)[row] = rstd;
    const V scale(rstd);
    for_vectors<V>(cols, [&](int64_t i, auto n) {
      V x_hat = load<V>(h + i, n) * scale;
      if constexpr (kHf) x_hat = x_hat.template rounded_to<T>();
      store(y + i, x_hat * load<V>(weight + i, n), n);
    });
  }
}

// x_hat = h * rstd, g = dy * weight: dx = rstd * (g - x_hat * mean(g * x_hat)) + dresidual; dweight = sum of dy * x_hat
template <typename T, typename W, bool kHf>
void bwd_row(const RmsNormBwd& a, int64_t row, acc_t<T>* partial) {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  const int64_t cols = a.cols;
  const T* dy = static_cast<const T*>(a.dy) + a.dy_rows.offset(row);
  const T* h = static_cast<const T*>(a.h) + a.h_rows.offset(row);
  const T* dresidual = a.dresidual ? static_cast<const T*>(a.dresidual) + a.dresidual_rows.offset(row) : nullptr;
  const auto* weight = static_cast<const W*>(a.weight);
  T* dx = static_cast<T*>(a.dx) + row * cols;
  const Acc rstd = static_cast<const Acc*>(a.rstd)[row];
  const V scale(rstd);
  V sums[2];
  int turn = 0;
  for_vectors<V>(cols, [&](int64_t i, auto n) {
    const V d = load<V>(dy + i, n), x_hat = load<V>(h + i, n) * scale;
    const V product = d * x_hat;
    sums[turn] = fma(product, load<V>(weight + i, n), sums[turn]);
    turn ^= 1;
    if (partial != nullptr) {
      const V term = kHf ? d * x_hat.template rounded_to<T>() : product;
      store(partial + i, load<V>(partial + i, n) + term, n);
    }
  });
  const V mean((sums[0] + sums[1]).sum() / static_cast<Acc>(cols));
  for_vectors<V>(cols, [&](int64_t i, auto n) {
    const V g = load<V>(dy + i, n) * load<V>(weight + i, n), x_hat = load<V>(h + i, n) * scale;
    V out = fnma(x_hat, mean, g) * scale;
    if (dresidual != nullptr) out = out + load<V>(dresidual + i, n);
    store(dx + i, out, n);
  });
}

template <typename T, typename W, bool kHf>
void bwd_chunks(const RmsNormBwd& a, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const int64_t rows = a.h_rows.count();
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Acc* partial = a.dweight ? static_cast<Acc*>(a.partial) + chunk * a.cols : nullptr;
    if (partial != nullptr) std::memset(partial, 0, sizeof(Acc) * a.cols);
    const int64_t first = chunk * a.rows_per_chunk, last = std::min(rows, first + a.rows_per_chunk);
    for (int64_t row = first; row < last; ++row) bwd_row<T, W, kHf>(a, row, partial);
  }
}

template <typename T, typename W>
void fwd_typed(const RmsNormFwd& a, int64_t begin, int64_t end) {
  if (a.residual) return a.hf ? fwd_rows<T, W, true, true>(a, begin, end) : fwd_rows<T, W, true, false>(a, begin, end);
  return a.hf ? fwd_rows<T, W, false, true>(a, begin, end) : fwd_rows<T, W, false, false>(a, begin, end);
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
  WITH_STORAGE(a.weight_dtype, W, {
    using Acc = acc_t<W>;
    using V = Vec<Acc>;
    for_vectors<V>(end - begin, [&](int64_t i, auto n) {
      const Acc* column = static_cast<const Acc*>(a.partial) + begin + i;
      V sum;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum = sum + load<V>(column + chunk * a.cols, n);
      store(static_cast<W*>(a.dweight) + begin + i, sum, n);
    });
  })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
