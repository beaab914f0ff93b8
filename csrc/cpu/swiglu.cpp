#include "../swiglu.h"

#include "dispatch.h"
#include "simd/math.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

// Calls body(row, first column, number of columns) for each part of a row that elements [begin, end) cover.
template <typename F> VEC_INLINE void for_row_parts(int64_t cols, int64_t begin, int64_t end, const F& body) {
  int64_t row = begin / cols, col = begin % cols;
  for (int64_t n; begin < end; begin += n, ++row, col = 0) {
    n = end - begin < cols - col ? end - begin : cols - col;
    body(row, col, n);
  }
}

// exp(-g), only as exact as a result of type T needs.
template <typename T, typename G> VEC_INLINE G exp_minus(G g) {
  using V = Vec<acc_t<T>>;
  if constexpr (sizeof(T) == 2) return exp2_for_16_bits(g * V(-1.44269504f));
  return exp(V(0) - g);
}

template <typename T> void fwd_part(const T* gate, const T* up, T* y, int64_t cols) {
  using V = Vec<acc_t<T>>;
  for_vectors<V, T>(cols, [&](int64_t i, auto n) VEC_LAMBDA {
    const auto g = load<V>(gate + i, n), u = load<V>(up + i, n);
    store(y + i, g / (V(1) + exp_minus<T>(g)) * u, n);
  });
}

// With e = exp(-g) and s = 1 / (1 + e): dup = dy * g * s and dgate = dy * up * s * (1 + g * (1 - s)). 1 - s is computed as e *
// s, which loses no digits where s is close to 1. Where s underflows to 0, e is infinite; e is bounded so that e * s is 0 and
// not NaN.
template <typename T> void bwd_part(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t cols) {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  const V most(sizeof(Acc) == 4 ? Acc(3.40282347e38) : Acc(1.7976931348623157e308));
  for_vectors<V, T>(cols, [&](int64_t i, auto n) VEC_LAMBDA {
    const auto d = load<V>(dy + i, n), g = load<V>(gate + i, n), u = load<V>(up + i, n);
    const auto e = exp_minus<T>(g);
    const auto s = V(1) / (V(1) + e);
    const auto ds = d * s;
    store(dup + i, ds * g, n);
    store(dgate + i, ds * u * fma(g, min(most, e) * s, V(1)), n);
  });
}

}  // namespace

void swiglu_fwd(const SwigluFwd& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, {
    for_row_parts(a.cols, begin, end, [&](int64_t row, int64_t col, int64_t n) {
      fwd_part(static_cast<const T*>(a.gate) + a.gate_rows.offset(row) + col,
               static_cast<const T*>(a.up) + a.up_rows.offset(row) + col,
               static_cast<T*>(a.y) + row * a.cols + col, n);
    });
  })
}

void swiglu_bwd(const SwigluBwd& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, {
    for_row_parts(a.cols, begin, end, [&](int64_t row, int64_t col, int64_t n) {
      bwd_part(static_cast<const T*>(a.dy) + a.dy_rows.offset(row) + col,
               static_cast<const T*>(a.gate) + a.gate_rows.offset(row) + col,
               static_cast<const T*>(a.up) + a.up_rows.offset(row) + col,
               static_cast<T*>(a.dgate) + row * a.out_stride + col,
               static_cast<T*>(a.dup) + row * a.out_stride + col, n);
    });
  })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
