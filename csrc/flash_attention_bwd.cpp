#include "flash_attention_bwd.h"

#include <cstring>

#include "attention_args.h"

namespace internlm2 {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t kSerial = 1 << 20;  // multiplications in a product below which a second thread costs more than it saves

// The tiles of the backward in the order in which threads take them: by sequence, then by groups of `abreast` heads, then by
// block, then by head within the group. The tile of a block waits for the blocks before it of the same head. With more heads
// abreast than threads, these have ended as a rule. A smaller `abreast` keeps fewer heads at once in the shared cache.
class BlockTiles {
 public:
  BlockTiles(int64_t heads, int64_t abreast, const std::vector<int64_t>& blocks)
      : heads_(heads), abreast_(abreast), blocks_(blocks) {}
  int64_t count() const { return heads_ * blocks_.back(); }
  BwdTile operator[](int64_t i) const {
    const auto after = std::upper_bound(blocks_.begin(), blocks_.end(), i / heads_);
    const int64_t s = after - blocks_.begin() - 1, n = blocks_[s + 1] - blocks_[s], rest = i - heads_ * blocks_[s];
    const int64_t first = rest / (n * abreast_) * abreast_, width = std::min(abreast_, heads_ - first);
    return {s, first + (rest - first * n) % width, (rest - first * n) / width};
  }

 private:
  int64_t heads_, abreast_;
  const std::vector<int64_t>& blocks_;
};

Gradients flash_attention_bwd_cpp(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& out, const Tensor& lse, const OptTensor& dlse, const OptTensor& cu_q,
                                  const OptTensor& cu_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                  int64_t window_left, int64_t window_right, double scale, double softcap) {
  check_cpu();
  FlashBwd a{};
  fill_attention(a, q, k, v, cu_q, cu_k, max_seqlen_q, max_seqlen_k, window_left, window_right, scale, softcap);
  a.tokens_q = cu_q.has_value() ? a.seqlen_q : a.sequences * a.seqlen_q;
  a.out = attention_tensor(out);
  a.dout = attention_tensor(dout);
  a.lse = cdata(lse);
  a.dlse = dlse.has_value() ? cdata(*dlse) : nullptr;
  Tensor dq = empty_as(q), dk = empty_as(k), dv = empty_as(v);
  a.dq = data(dq);
  a.dk = data(dk);
  a.dv = data(dv);

  std::vector<int64_t> q_blocks{0}, k_blocks{0};
  int64_t pairs = 0;
  for (int64_t s = 0; s < a.sequences; ++s) {
    q_blocks.push_back(q_blocks.back() + (a.length_q(s) + kBwdQueries - 1) / kBwdQueries);
    k_blocks.push_back(k_blocks.back() + (a.length_k(s) + kBwdKeys - 1) / kBwdKeys);
    pairs += a.length_q(s) * a.length_k(s);
  }
  a.q_blocks = q_blocks.data();
  a.k_blocks = k_blocks.data();
  const bool serial = pairs * a.heads * a.d < kSerial;
  const int64_t workers = serial ? 1 : workers_for(a.kv_heads * k_blocks.back());
  const BlockTiles queries(a.heads, 1, q_blocks), keys(a.kv_heads, 2 * workers, k_blocks);

  const auto [columns, bytes] = INTERNLM2_CPU_MATRIX(flash_attention_bwd_sizes, a);
  const auto acc = accumulator_of(q);
  Tensor shift = torch::stable::new_empty(lse, lse.sizes()), delta = torch::stable::new_empty(lse, lse.sizes());
  Tensor sum = torch::stable::new_empty(q, {a.heads, a.tokens_q, columns}, acc);
  Tensor turns = torch::stable::new_empty(q, {a.heads * q_blocks.back()}, torch::headeronly::ScalarType::Int);
  Tensor scratch = torch::stable::new_empty(q, {workers, bytes}, torch::headeronly::ScalarType::Char);
  a.shift = data(shift);
  a.delta = data(delta);
  a.dq_sum = data(sum);
  a.turns = static_cast<int32_t*>(data(turns));
  if (turns.numel() > 0) std::memset(a.turns, 0, static_cast<size_t>(turns.numel()) * sizeof(int32_t));

  for_tiles(queries.count(), serial ? 1 : workers_for(queries.count()),
            [&](int64_t i, int64_t) { INTERNLM2_CPU_MATRIX(flash_attention_bwd_prepare, a, queries[i]); });
  for_tiles(keys.count(), workers, [&](int64_t i, int64_t worker) {
    INTERNLM2_CPU_MATRIX(flash_attention_bwd, a, keys[i], static_cast<char*>(data(scratch)) + worker * scratch.size(1));
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) { INTERNLM2_IMPL(m, "flash_attention_bwd.cpp", flash_attention_bwd_cpp); }

}  // namespace internlm2
