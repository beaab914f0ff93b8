#include "../rope_table.h"

#include <cmath>

#include "rope.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY {

void rope_table_fwd(const RopeTableFwd& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t position = index_at(a.positions, a.positions_dtype, row);
    float *cos = a.cos + row * a.half, *sin = a.sin + row * a.half;
    for (int64_t i = 0; i < a.half; ++i) {
      if (a.float32_angles) {
        const float angle = static_cast<float>(position) * static_cast<float>(a.inv_freq[i]);
        const float magnitude = static_cast<float>(a.magnitude);
        cos[i] = std::cos(angle) * magnitude;
        sin[i] = std::sin(angle) * magnitude;
      } else {
        const double angle = static_cast<double>(position) * a.inv_freq[i];
        cos[i] = static_cast<float>(std::cos(angle) * a.magnitude);
        sin[i] = static_cast<float>(std::sin(angle) * a.magnitude);
      }
    }
  }
}

}}}  // namespace internlm2::cpu::CPU_CAPABILITY
