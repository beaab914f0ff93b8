// Built for: avx2 avx512 avx512_bf16 amx
#include "../../linear_head.h"

#include "head_products.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {

HeadSizes linear_head_sizes(const LinearHead& a) {
  WITH_STORAGE(a.dtype, T, { return Head<T>(a).sizes(); })
  return {};
}

int64_t linear_head_pack_tiles(const LinearHead& a) {
  WITH_STORAGE(a.dtype, T, { return Head<T>(a).pack_tiles(); })
  return 0;
}

void linear_head_pack(const LinearHead& a, int64_t tile) {
  WITH_STORAGE(a.dtype, T, { Head<T>(a).pack(tile); })
}

void linear_head_scores(const LinearHead& a, int64_t block, void* scratch) {
  begin_tiles();
  WITH_STORAGE(a.dtype, T, { Head<T>(a).scores(block, scratch); })
  end_tiles();
}

void linear_head_merge(const LinearHead& a, int64_t begin, int64_t end) {
  WITH_STORAGE(a.dtype, T, { Head<T>(a).merge(begin, end); })
}

void linear_head_dweight(const LinearHead& a, int64_t span, void* scratch) {
  begin_tiles();
  WITH_STORAGE(a.dtype, T, { Head<T>(a).dweight(span, scratch); })
  end_tiles();
}

void linear_head_dhidden(const LinearHead& a, int64_t row, int64_t rows, int64_t column, int64_t columns,
                         void* scratch) {
  begin_tiles();
  WITH_STORAGE(a.dtype, T, { Head<T>(a).dhidden(row, rows, column, columns, scratch); })
  end_tiles();
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
