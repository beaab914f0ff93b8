// Fills the arguments of the attention kernels from tensors and options, after checking values; divides a call into tiles and
// runs them on threads. Shared by the bindings of flash_attention and paged_attention.
#pragma once
#include "checks.h"
#include "flash_attention.h"
#include "threads.h"

namespace internlm2 {

// kTilesPerThread: so many tiles for each thread balance the load. kMostThreads: more than any machine has.
constexpr int64_t kTilesPerThread = 4, kMostThreads = 1 << 20;

inline AttentionTensor attention_tensor(const Tensor& t) {
  const int64_t dim = t.dim();
  return {cdata(t), dim == 4 ? t.stride(0) : 0, t.stride(dim - 3), t.stride(dim - 2)};
}

// Checks cu_seqlens_q or cu_seqlens_k (`side` is "q" or "k") and that no sequence is longer than `longest`, the argument
// max_seqlen (-1: not given). Returns the pointer to its values.
inline const int32_t* checked_cu_seqlens(const char* op, const std::string& side, const Tensor& cu, int64_t total,
                                         int64_t longest) {
  const int64_t most = check_cu_seqlens(op, ("cu_seqlens_" + side).c_str(), cu, total);
  INTERNLM2_CHECK_VALUE(longest < 0 || most <= longest, op, "max_seqlen_" + side, "at least the longest sequence, ", most,
                        ", got ", longest);
  return static_cast<const int32_t*>(cdata(cu));
}

// Sets the arguments that forward and backward share. The public function has made sure that q, k and v are either all packed,
// with cu_q and cu_k, or all dense, without them.
inline void fill_attention(Attention& a, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_q,
                           const OptTensor& cu_k, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t window_left,
                           int64_t window_right, double scale, double softcap) {
  const bool packed = cu_q.has_value();
  const int64_t dim = q.dim();
  if (packed) {
    a.cu_q = checked_cu_seqlens("flash_attention", "q", *cu_q, q.size(0), max_seqlen_q);
    a.cu_k = checked_cu_seqlens("flash_attention", "k", *cu_k, k.size(0), max_seqlen_k);
  }
  a.dtype = dtype_of(q);
  a.sequences = packed ? cu_q->numel() - 1 : q.size(0);
  a.heads = q.size(dim - 2);
  a.kv_heads = k.size(dim - 2);
  a.d = q.size(dim - 1);
  a.seqlen_q = q.size(dim - 3);
  a.seqlen_k = k.size(dim - 3);
  a.window_left = window_left;
  a.window_right = window_right;
  a.scale = scale;
  a.softcap = softcap;
  a.q = attention_tensor(q);
  a.k = attention_tensor(k);
  a.v = attention_tensor(v);
  a.lse_head_stride = a.seqlen_q;
  a.lse_sequence_stride = a.heads * a.seqlen_q;
}

// The splits [first, last) that hold unmasked keys of the tile's rows. Split i is keys [i * split_keys, (i + 1) * split_keys).
inline std::pair<int64_t, int64_t> splits_of(const Attention& a, const AttentionTile& tile, int64_t split_keys) {
  const int64_t first = a.first_key(tile.sequence, tile.begin), last = a.last_key(tile.sequence, tile.end - 1);
  return {first / split_keys, last <= first ? first / split_keys : (last - 1) / split_keys + 1};
}

// All tiles of a forward, the most expensive first, for load balance. A decode tile (at most tiling.decode_lanes rows times
// query heads of a group) takes several key heads, as long as kTilesPerThread tiles are left for each thread.
inline std::vector<AttentionTile> attention_tiles(const Attention& a, const AttentionTiling& tiling, int64_t threads) {
  std::vector<std::pair<int64_t, AttentionTile>> costs;
  int64_t splits = 0;
  const auto for_row_tiles = [&](const auto& body) {
    for (int64_t s = 0; s < a.sequences; ++s) {
      const int64_t length = a.length_q(s);
      for (int64_t begin = 0; begin < length; begin += tiling.rows) {
        body(AttentionTile{s, 0, 1, begin, std::min(begin + tiling.rows, length)});
      }
    }
  };
  for_row_tiles([&](const AttentionTile& tile) {
    const auto [first, last] = splits_of(a, tile, tiling.split_keys);
    splits += std::max<int64_t>(last - first, 1);
  });
  const int64_t together = std::min(a.kv_heads, std::max<int64_t>(1, a.kv_heads * splits / (kTilesPerThread * threads)));
  for_row_tiles([&](AttentionTile tile) {
    const int64_t heads = (tile.end - tile.begin) * a.group() <= tiling.decode_lanes ? together : 1;
    const int64_t keys = a.last_key(tile.sequence, tile.end - 1) - a.first_key(tile.sequence, tile.begin);
    for (; tile.kv_head < a.kv_heads; tile.kv_head += heads) {
      tile.kv_heads = std::min(heads, a.kv_heads - tile.kv_head);
      costs.push_back({keys * (tile.end - tile.begin) * tile.kv_heads, tile});
    }
  });
  std::stable_sort(costs.begin(), costs.end(), [](const auto& x, const auto& y) { return x.first > y.first; });
  std::vector<AttentionTile> tiles;
  tiles.reserve(costs.size());
  for (const auto& one : costs) tiles.push_back(one.second);
  return tiles;
}

// Runs a forward. tiling_of(longest) returns the operator's AttentionTiling, and run(tile, scratch) computes one AttentionTile.
// Where there are too few tiles for the threads, tiles are split along the keys (split-K), the most expensive first, until
// there are enough; when all splits are done, each split tile joins its partial results.
template <typename Tiling, typename Run>
void run_attention(const FlashFwd& a, const Tensor& like, const Tiling& tiling_of, const Run& run) {
  int64_t longest = 0, states = 0;
  for (int64_t s = 0; s < a.sequences; ++s) longest = std::max(longest, a.length_q(s));
  const AttentionTiling tiling = tiling_of(longest);
  const int64_t threads = workers_for(kMostThreads), enough = 2 * kTilesPerThread * threads;
  const std::vector<AttentionTile> tiles = attention_tiles(a, tiling, threads);
  std::vector<AttentionTile> tasks, splits, joins;
  int64_t count = static_cast<int64_t>(tiles.size());
  const bool too_few = count < enough;
  for (AttentionTile tile : tiles) {
    const auto [first, last] = splits_of(a, tile, tiling.split_keys);
    if (!too_few || last - first <= 1 || count >= 2 * enough) {
      tasks.push_back(tile);
      continue;
    }
    for (tile.split = first; tile.split < last; ++tile.split) splits.push_back(tile);
    tile.split = -1;
    tile.splits = last - first;
    joins.push_back(tile);
    states += last - first;
    count += last - first - 1;
  }
  const auto bytes = [&](int64_t size) {
    return torch::stable::new_empty(like, {size}, torch::headeronly::ScalarType::Char);
  };
  const int64_t workers = workers_for(count);
  Tensor slab = bytes(states * tiling.state_bytes), scratch = bytes(workers * tiling.scratch_bytes);
  const auto run_all = [&](const std::vector<AttentionTile>& all) {
    for_tiles(static_cast<int64_t>(all.size()), workers, [&](int64_t i, int64_t worker) {
      run(all[static_cast<size_t>(i)], static_cast<char*>(data(scratch)) + worker * tiling.scratch_bytes);
    });
  };
  char* state = static_cast<char*>(data(slab));
  int64_t used = 0;
  for (AttentionTile& tile : splits) tile.state = state + tiling.state_bytes * used++;
  used = 0;
  for (AttentionTile& tile : joins) {
    tile.state = state + tiling.state_bytes * used;
    tile.state_bytes = tiling.state_bytes;
    used += tile.splits;
  }
  tasks.insert(tasks.end(), splits.begin(), splits.end());  // last, because they cost least: the threads end together
  run_all(tasks);
  run_all(joins);
}

}  // namespace internlm2
