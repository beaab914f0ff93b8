// Distribution of work over torch's own thread pool. In a forked child everything runs on the calling thread, because the
// pool's threads do not exist there.
#pragma once
#include <atomic>

#include "runtime.h"
#include "stable.h"

namespace internlm2 {

// Calls f(begin, end) for contiguous parts of [0, n), one for each thread. `grain` is the number of rows below which a second
// thread costs more than it saves.
template <typename F>
inline void for_rows(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain || in_forked_child()) return f(0, n);
  torch::stable::parallel_for(0, n, grain, f);
}

// The grain of for_rows for rows of `width` elements, where a second thread pays from `elements` elements on.
inline int64_t grain_of(int64_t elements, int64_t width) {
  return std::max<int64_t>(1, elements / std::max<int64_t>(width, 1));
}

// How many threads can work on `tiles` tiles that are handed out one by one.
inline int64_t workers_for(int64_t tiles) {
  if (tiles <= 1 || in_forked_child()) return 1;
  const int64_t threads = torch::stable::get_num_threads();
  return tiles < threads ? tiles : threads;
}

// Calls f(tile, worker) for every tile in [0, tiles). Tiles are handed out in rising order, each to the next free worker. Tiles
// of unequal cost should be ordered with the most expensive first, for load balance. What a tile computes must not depend on
// its worker.
template <typename F>
inline void for_tiles(int64_t tiles, int64_t workers, const F& f) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t worker, int64_t) {
    for (int64_t tile; (tile = next.fetch_add(1, std::memory_order_relaxed)) < tiles;) f(tile, worker);
  };
  if (workers <= 1) return work(0, 1);
  torch::stable::parallel_for(0, workers, 1, work);
}

}  // namespace internlm2
