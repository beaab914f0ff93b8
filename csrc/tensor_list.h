// Lists of tensors, for the optimizer's operators. Each tensor is divided into chunks, and the chunks of all tensors are
// numbered through, so that many small tensors are distributed over the threads as well as a few large ones.
#pragma once
#include <algorithm>
#include <utility>

#include "errors.h"
#include "threads.h"

namespace internlm2 {

using Tensors = std::vector<Tensor>;

constexpr int64_t kListChunk = 65536;  // the most elements of a chunk, all of one tensor

class Chunks {
 public:
  void add(int64_t numel) { ends_.push_back(count() + (numel + kListChunk - 1) / kListChunk); }
  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }
  // Calls f(chunk, tensor, first) for each chunk on threads; `first` is the element of the tensor at which the chunk begins.
  template <typename F> void run(const F& f) const {
    for_tiles(count(), workers_for(count()), [&](int64_t chunk, int64_t) {
      const auto tensor = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), chunk) - ends_.begin());
      f(chunk, tensor, (chunk - (tensor ? ends_[tensor - 1] : 0)) * kListChunk);
    });
  }

 private:
  std::vector<int64_t> ends_;
};

// Whether the elements of a tensor lie in memory without gaps, whatever the order of its dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) > 1) dims.emplace_back(t.stride(i), t.size(i));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline void check_dense(const char* op, const char* argument, const Tensor& t, size_t i) {
  INTERNLM2_CHECK_VALUE(is_dense(t), op, argument, "dense tensors, got one with gaps at ", i);
}

}  // namespace internlm2
