// Checks of index values that several bindings share. They run before anything is written.
#pragma once
#include <algorithm>
#include <string>

#include "errors.h"
#include "stable.h"

namespace internlm2 {

// Checks that every value of a contiguous int32 or int64 CPU tensor is in [low, high).
inline void check_range(const char* op, const char* argument, const Tensor& values, int64_t low, int64_t high) {
  const int64_t n = values.numel();
  if (n == 0) return;
  int64_t smallest = low, largest = high - 1;
  const auto scan = [&](const auto* p) {  // minimum and maximum in one loop, without a branch: the compiler vectorizes it
    auto least = p[0], most = p[0];
    for (int64_t i = 1; i < n; ++i) {
      least = p[i] < least ? p[i] : least;
      most = p[i] > most ? p[i] : most;
    }
    smallest = least;
    largest = most;
  };
  dtype_of(values) == Dtype::i32 ? scan(static_cast<const int32_t*>(cdata(values)))
                                 : scan(static_cast<const int64_t*>(cdata(values)));
  INTERNLM2_CHECK_VALUE(smallest >= low && largest < high, op, argument, "values from ", low, " to ", high - 1, ", got ",
                        smallest < low ? smallest : largest);
}

// Checks that cu_seqlens, a contiguous int32 CPU tensor, starts at 0 and ends at `total`, and that every sequence has at least
// `shortest` tokens. Returns the length of the longest sequence.
inline int64_t check_cu_seqlens(const char* op, const char* argument, const Tensor& cu_seqlens, int64_t total,
                                int64_t shortest = 0) {
  const auto* p = static_cast<const int32_t*>(cdata(cu_seqlens));
  const int64_t sequences = cu_seqlens.numel() - 1;
  INTERNLM2_CHECK_VALUE(sequences >= 0, op, argument, "at least one value, got none");
  INTERNLM2_CHECK_VALUE(p[0] == 0, op, argument, "values that start at 0, got ", p[0]);
  int64_t longest = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t length = int64_t{p[i + 1]} - p[i];
    INTERNLM2_CHECK_VALUE(length >= shortest, op, argument, "values that ",
                          shortest > 0 ? "rise by at least " + std::to_string(shortest) : std::string("never fall"), ", got ",
                          p[i + 1], " after ", p[i]);
    longest = std::max(longest, length);
  }
  INTERNLM2_CHECK_VALUE(p[sequences] == total, op, argument, "values that end at ", total, ", got ", p[sequences]);
  return longest;
}

}  // namespace internlm2
