// Heads over a vocabulary, l = softcap(scale * hidden weight^T), whose logits are never all in memory: the raw-pointer contract
// between the bindings (linear_cross_entropy.cpp, linear_logprobs.cpp) and the kernels. Method: csrc/cpu/head/linear_head.cpp.
#pragma once
#include "types.h"

namespace internlm2 {

constexpr int64_t kHeadBlock = 64;     // columns of the vocabulary that share one set of statistics
constexpr int64_t kHeadSpan = 384;     // columns of the vocabulary in one tile of the gradients: whole blocks
constexpr int64_t kHeadColumns = 512;  // the most columns of hidden in one tile of dhidden
constexpr int64_t kHeadPackRows = 48, kHeadMergeRows = 16;

// What is stored of a chunk's logits: nothing; exp(l - the block's largest) in bfloat16; l in the accumulator's dtype; or the
// gradient. Exponentials and logits are later turned into the gradient in place.
enum class HeadStore : int { none, exponentials, logits, gradient };

// A chunk of `rows` successive tokens. Pointers to hidden, labels and results are to its first token.
struct LinearHead {
  Dtype dtype;  // of hidden and weight; the accumulator's dtype is float, double for f64
  const void *hidden, *weight;
  int64_t hidden_stride, weight_stride;  // between rows
  int64_t rows, d, vocab;
  double scale, softcap;
  const int64_t* label;  // [rows] the label's row of weight; -1: none
  HeadStore store;
  int64_t capacity;  // rows for which the memory below is laid out, a multiple of 16
  void *hidden_rows, *hidden_steps;  // hidden as operands
  void* scores;                      // [spans][capacity][kHeadSpan], what `store` says
  // Statistics [blocks][capacity]: the largest logit, sum of e = exp(l - largest), where wanted sum of e (l - largest), sum of
  // l, the first column of the largest.
  void *block_max, *block_sum, *block_dot, *block_total;
  int32_t* block_best;
  // Results, [rows] in the accumulator's dtype: all but the first two may be null.
  void *label_logit, *top, *log_sum, *entropy, *best, *total;
  int32_t* best_column;
  // dl_j = p_j (a + b (l_j - lse)) + s + [j is the label's] (k - a), p_j = exp(l_j - lse), before the soft-cap's slope: [rows].
  const void *a, *b, *s, *k;
  bool fresh, last;   // whether the chunk is the first, the last
  Dtype dweight_dtype, dhidden_dtype;
  void *dweight_sum;  // [vocab, d] in the accumulator's dtype; null: there is one chunk, whose sums are written to dweight
  void *dweight;      // [vocab, d], written with the last chunk; null: not needed, or dweight_sum is the result
  void *dhidden;      // [rows, d]; null: not needed
  int64_t dhidden_rows, dhidden_columns;  // of a tile
};

// The most tokens of a chunk, with stored scores and without; bytes of memory for `capacity` rows; the panels of hidden's columns.
struct HeadSizes { int64_t most_rows, most_rows_alone, hidden_rows, hidden_steps, scores, scratch, column_panels; };

// The steps in which a chunk is computed. The tiles of a step may run in any order on any threads. They are kHeadPackRows rows
// of hidden and then, where dweight is needed, column panels; blocks; kHeadMergeRows rows; spans, whose gradients of the scores
// are formed too; and dhidden_rows x dhidden_columns of dhidden.
enum class HeadStep { pack, scores, merge, dweight, dhidden };

INTERNLM2_CPU_MATRIX_KERNELS(
  HeadSizes linear_head_sizes(const LinearHead& a);
  void linear_head_step(const LinearHead& a, HeadStep step, int64_t tile, void* scratch);)

}  // namespace internlm2
