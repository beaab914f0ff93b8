// The gradient of a linear layer's bias. A column is summed in blocks of kBlockRows rows, and the blocks in rising order.
#include "../linear.h"

#include "dispatch.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockRows = 256;

template <typename T> void sum_columns(const LinearBias& a, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  using V = Vec<Acc>;
  const T* dy = static_cast<const T*>(a.dy) + begin;
  Acc* out = static_cast<Acc*>(a.dbias) + begin;
  for_vectors<V, Single>(end - begin, [&](int64_t j, auto n) VEC_LAMBDA {
    V total(Acc(0));
    for (int64_t i = 0; i < a.rows; i += kBlockRows) {
      V sum(Acc(0));
      for (int64_t r = i; r < a.rows && r < i + kBlockRows; ++r) sum = sum + load<V>(dy + r * a.stride + j, n);
      total = total + sum;
    }
    store(out + j, total, n);
  });
}

}  // namespace

void linear_dbias(const LinearBias& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, { sum_columns<T>(a, begin, end); })
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
