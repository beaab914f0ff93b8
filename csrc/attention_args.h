// From the tensors and options of flash_attention's operators to the kernels' contract, values checked first.
#pragma once
#include <algorithm>
#include <vector>

#include "flash_attention.h"
#include "stable.h"

namespace internlm2 {

constexpr int64_t kUnitsPerThread = 4, kMostThreads = 1 << 20;

inline AttentionTensor attention_tensor(const Tensor& t) {
  const int64_t dim = t.dim();
  return {cdata(t), dim == 4 ? t.stride(0) : 0, t.stride(dim - 3), t.stride(dim - 2)};
}

// cu_seqlens (int32, contiguous, CPU) begins at 0, never falls, ends at `total`, and no sequence is longer than `longest`
// (-1: unknown).
inline void check_cu_seqlens(const char* op, const char* side, const Tensor& cu, int64_t total, int64_t longest) {
  const int64_t n = cu.numel();
  const auto* p = static_cast<const int32_t*>(cdata(cu));
  STD_TORCH_CHECK(n >= 1 && p[0] == 0, "ValueError: ", op, ": cu_seqlens_", side, ": expected values that start at 0, got ",
                  n >= 1 ? p[0] : -1);
  int64_t most = 0;
  for (int64_t i = 0; i + 1 < n; ++i) {
    STD_TORCH_CHECK(p[i + 1] >= p[i], "ValueError: ", op, ": cu_seqlens_", side, ": expected values that never fall, got ",
                    p[i + 1], " after ", p[i]);
    most = std::max<int64_t>(most, static_cast<int64_t>(p[i + 1]) - p[i]);
  }
  STD_TORCH_CHECK(p[n - 1] == total, "ValueError: ", op, ": cu_seqlens_", side, ": expected values that end at ", total,
                  ", got ", p[n - 1]);
  STD_TORCH_CHECK(longest < 0 || most <= longest, "ValueError: ", op, ": max_seqlen_", side,
                  ": expected at least the longest sequence, ", most, ", got ", longest);
}

// q and k, v either all packed with both cu_seqlens, or all dense with neither (the public function sees to that).
inline void fill_attention(Attention& a, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& cu_q,
                           const OptTensor& cu_k, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t window_left,
                           int64_t window_right, double scale, double softcap) {
  const bool packed = cu_q.has_value();
  const int64_t dim = q.dim();
  if (packed) {
    check_cu_seqlens("flash_attention", "q", *cu_q, q.size(0), max_seqlen_q);
    check_cu_seqlens("flash_attention", "k", *cu_k, k.size(0), max_seqlen_k);
    a.cu_q = static_cast<const int32_t*>(cdata(*cu_q));
    a.cu_k = static_cast<const int32_t*>(cdata(*cu_k));
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

// The splits [first, last) along the keys that a unit's rows see.
inline std::pair<int64_t, int64_t> splits_of(const Attention& a, const FlashUnit& u, int64_t split_keys) {
  const int64_t first = a.first_key(u.sequence, u.begin), last = a.last_key(u.sequence, u.end - 1);
  return {first / split_keys, last <= first ? first / split_keys : (last - 1) / split_keys + 1};
}

// All units of a forward, those of the most work first, so that the threads end together. Units of few rows take several
// key heads, as long as there remain enough units to share out.
inline std::vector<FlashUnit> attention_units(const Attention& a, const FlashPlan& plan, int64_t threads) {
  std::vector<std::pair<int64_t, FlashUnit>> all;
  int64_t parts = 0;
  const auto each = [&](const auto& body) {
    for (int64_t s = 0; s < a.sequences; ++s) {
      const int64_t length = a.length_q(s);
      for (int64_t begin = 0; begin < length; begin += plan.rows) {
        body(FlashUnit{s, 0, 1, begin, std::min(begin + plan.rows, length), -1, nullptr});
      }
    }
  };
  each([&](const FlashUnit& u) {
    const auto [first, last] = splits_of(a, u, plan.split_keys);
    parts += std::max<int64_t>(last - first, 1);
  });
  const int64_t together = std::min(a.kv_heads, std::max<int64_t>(1, a.kv_heads * parts / (kUnitsPerThread * threads)));
  each([&](FlashUnit u) {
    const int64_t heads = (u.end - u.begin) * a.group() <= plan.few_lanes ? together : 1;
    const int64_t keys = a.last_key(u.sequence, u.end - 1) - a.first_key(u.sequence, u.begin);
    for (u.kv_head = 0; u.kv_head < a.kv_heads; u.kv_head += heads) {
      u.kv_heads = std::min(heads, a.kv_heads - u.kv_head);
      all.push_back({keys * (u.end - u.begin) * u.kv_heads, u});
    }
  });
  std::stable_sort(all.begin(), all.end(), [](const auto& x, const auto& y) { return x.first > y.first; });
  std::vector<FlashUnit> units;
  units.reserve(all.size());
  for (const auto& one : all) units.push_back(one.second);
  return units;
}

// Runs a forward: plan(longest), unit(unit, scratch) and join(unit, states, stride, splits, scratch) are the operator's
// kernels. Where the units are too few to share out, splits along the keys become parts of their own, of the largest units
// first and of no more than the threads need: each keeps its state until all are joined.
template <typename Plan, typename Unit, typename Join>
void run_attention(const FlashFwd& a, const Tensor& like, const Plan& plan_of, const Unit& run, const Join& join) {
  int64_t longest = 0, states = 0;
  for (int64_t s = 0; s < a.sequences; ++s) longest = std::max(longest, a.length_q(s));
  const FlashPlan plan = plan_of(longest);
  const int64_t threads = workers_for(kMostThreads);
  std::vector<FlashUnit> tasks, heads;  // heads: the first split of every unit that is split
  const std::vector<FlashUnit> units = attention_units(a, plan, threads);
  const int64_t enough = 2 * kUnitsPerThread * threads;
  int64_t parts = static_cast<int64_t>(units.size());
  const bool few = parts < enough;
  std::vector<FlashUnit> cut;
  for (FlashUnit u : units) {
    const auto [first, last] = splits_of(a, u, plan.split_keys);
    if (!few || last - first <= 1 || parts >= 2 * enough) {
      tasks.push_back(u);
      continue;
    }
    for (u.split = first; u.split < last; ++u.split) cut.push_back(u);
    states += last - first;
    parts += last - first - 1;
  }
  tasks.insert(tasks.end(), cut.begin(), cut.end());  // the small ones last: the threads end together
  const auto bytes = [&](int64_t size) {
    return torch::stable::new_empty(like, {size}, torch::headeronly::ScalarType::Char);
  };
  const int64_t count = static_cast<int64_t>(tasks.size()), workers = workers_for(count);
  Tensor slab = bytes(states * plan.state_bytes), scratch = bytes(workers * plan.scratch_bytes);
  char* state = static_cast<char*>(data(slab));
  for (FlashUnit& task : tasks) {
    if (task.split < 0) continue;
    task.state = state;
    state += plan.state_bytes;
    if (task.split == splits_of(a, task, plan.split_keys).first) heads.push_back(task);
  }
  const auto memory = [&](int64_t worker) { return static_cast<char*>(data(scratch)) + worker * plan.scratch_bytes; };
  for_units(count, workers, [&](int64_t i, int64_t worker) { run(tasks[i], memory(worker)); });
  for_units(static_cast<int64_t>(heads.size()), workers, [&](int64_t i, int64_t worker) {
    const auto [first, last] = splits_of(a, heads[i], plan.split_keys);
    join(heads[i], heads[i].state, plan.state_bytes, last - first, memory(worker));
  });
}

}  // namespace internlm2
