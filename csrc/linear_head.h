// Heads over a vocabulary, l = softcap(scale * hidden weight^T), whose logits are never all in memory: the arguments that the
// bindings (linear_cross_entropy.cpp, linear_logprobs.cpp) pass to the kernels, as raw pointers. Method:
// csrc/cpu/head/linear_head.cpp.
#pragma once
#include "types.h"

namespace internlm2 {

// The vocabulary is divided into blocks, for the scores and their statistics, and into spans of several blocks, for the
// gradients.
constexpr int64_t kHeadBlock = 64;     // columns of the vocabulary in a block
constexpr int64_t kHeadSpan = 384;     // columns of the vocabulary in a span
constexpr int64_t kHeadColumns = 512;  // the most columns of hidden in one tile of dhidden
// Rows of the chunk in one tile of HeadStep::pack (kHeadPackRows) and of HeadStep::merge (kHeadMergeRows).
constexpr int64_t kHeadPackRows = 48, kHeadMergeRows = 16;

// What the step `scores` stores of each logit l of a chunk:
//   none         nothing, where no gradient is needed
//   exponentials exp(l - the largest logit of the block) in bfloat16, which a later step turns into the gradient in place
//   logits       l in the accumulator's dtype, which a later step turns into the gradient in place
//   gradient     the gradient itself, where lse is known from the forward
enum class HeadStore : int { none, exponentials, logits, gradient };

// The arguments for one chunk of `rows` successive tokens. Pointers to hidden, labels and results point to its first token.
struct LinearHead {
  Dtype dtype;  // of hidden and weight; the accumulator's dtype is float, double for f64
  const void *hidden, *weight;
  int64_t hidden_stride, weight_stride;  // between rows
  int64_t rows, d, vocab;
  double scale, softcap;
  const int64_t* label;  // [rows] the row of weight that is the token's label; -1: no label, or one of another shard
  HeadStore store;
  int64_t capacity;  // rows for which the memory below is laid out, a multiple of 16
  void *hidden_rows, *hidden_steps;  // hidden packed as an operand of the scores (hidden_rows) and of dweight (hidden_steps)
  void* scores;                      // [spans][capacity][kHeadSpan], of the contents that `store` names
  // Statistics [blocks][capacity] of the logits l of a block: block_max the largest; block_sum the sum of e = exp(l - largest);
  // and, each null where it is not needed, block_dot the sum of e (l - largest), block_total the sum of l, block_best the first
  // column that has the largest.
  void *block_max, *block_sum, *block_dot, *block_total;
  int32_t* block_best;
  // Results for each token over the whole vocabulary, [rows] in the accumulator's dtype: the label's logit, the largest logit
  // (top), log(sum of exp(l - top)), the entropy, the largest logit (best) with its column, and the sum of the logits. The last
  // four are null where they are not needed.
  void *label_logit, *top, *log_sum, *entropy, *best, *total;
  int32_t* best_column;
  // The coefficients, [rows], of the gradient of logit j: dl_j = p_j (a + b (l_j - lse)) + s, plus k - a where j is the label,
  // with p_j = exp(l_j - lse). With a soft-cap it is then multiplied with the slope of the soft-cap.
  const void *a, *b, *s, *k;
  bool fresh, last;   // whether the chunk is the first of the call (dweight_sum holds nothing yet), whether it is the last
  Dtype dweight_dtype, dhidden_dtype;
  void *dweight_sum;  // [vocab, d] in the accumulator's dtype; null: there is one chunk, whose sums are written to dweight
  void *dweight;      // [vocab, d], written with the last chunk; null: not needed, or dweight_sum is the result
  void *dhidden;      // [rows, d]; null: not needed
  int64_t dhidden_rows, dhidden_columns;  // of one tile of dhidden
};

// most_rows, most_rows_alone: the most tokens of a chunk with stored scores, and without (HeadStore::none). hidden_rows,
// hidden_steps, scores: bytes of these arrays for `capacity` rows. scratch: bytes of each thread's scratch memory.
// column_panels: into how many panels the columns of hidden are packed for dweight.
struct HeadSizes { int64_t most_rows, most_rows_alone, hidden_rows, hidden_steps, scores, scratch, column_panels; };

// The steps in which a chunk is computed, one after the other. The tiles of a step may run in any order on any threads:
//   pack     packs hidden. A tile is kHeadPackRows rows; where dweight is needed, more tiles follow, one for each column panel.
//   scores   computes logits and their statistics. A tile is one block of the vocabulary.
//   merge    merges the statistics of all blocks into the results. A tile is kHeadMergeRows rows.
//   dweight  forms the gradient of the logits and adds its product with hidden to dweight. A tile is one span.
//   dhidden  multiplies the gradient of the logits with weight. A tile is dhidden_rows x dhidden_columns of dhidden.
enum class HeadStep { pack, scores, merge, dweight, dhidden };

INTERNLM2_CPU_MATRIX_KERNELS(
  HeadSizes linear_head_sizes(const LinearHead& a);
  void linear_head_step(const LinearHead& a, HeadStep step, int64_t tile, void* scratch);)

}  // namespace internlm2
