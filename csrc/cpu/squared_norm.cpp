#include "../squared_norm.h"

#include "elementwise.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

VEC_INLINE void add_squares(Two<Vec<double>>& sum, Vec<float> x) {  // squares in double: no float's overflows
  const Vec<double> low = lower_half(x), high = upper_half(x);
  sum = {fma(low, low, sum.a), fma(high, high, sum.b)};
}
VEC_INLINE void add_squares(Two<Vec<double>>& sum, Vec<double> x) { sum.a = fma(x, x, sum.a); }
template <typename V> VEC_INLINE void add_squares(Two<Vec<double>>& sum, Two<V> x) {
  add_squares(sum, x.a);
  add_squares(sum, x.b);
}

template <typename T> double squares(const T* x, int64_t n) {
  using V = Vec<acc_t<T>>;
  Two<Vec<double>> sums[4];
  double first = 0;
  int64_t i = 0;
  if constexpr (sizeof(T) == 2) {  // float holds these squares without rounding: eight are added before widening
    WideSum eights[2];
    constexpr int64_t step = 16 * V::size;
    for (; i + step <= n; i += step) {
      for (int u = 0; u < 2; ++u) {
        Two<V> sum;
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const Two<V> value = load<V>(x + i + (4 * u + k) * 2 * V::size, Both<T>{});
          add_to(sum, value, value);
        }
        eights[u].add(sum.a + sum.b);
      }
    }
    first = eights[0].sum() + eights[1].sum();
  }
  x += i;
  for_unrolled<4, V, T>(n - i, [&](int64_t j, auto lanes, int u) VEC_LAMBDA {
    add_squares(sums[u], load<V>(x + j, lanes));
  });
  const Two<Vec<double>> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return first + (sum.a + sum.b).sum();
}

}  // namespace

double sum_of_squares(const In& grad, int64_t begin, int64_t end) {
  WITH_STORAGE(grad.dtype, T, { return squares(static_cast<const T*>(grad.data) + begin, end - begin); })
  return 0;
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
