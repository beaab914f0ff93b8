// Sampling of a token from each row of logits: the arguments that the binding passes to the kernel, as raw pointers. Contract:
// internlm2_kernels/ops/sample.py.
#pragma once
#include "types.h"

namespace internlm2 {

constexpr int64_t kSampleRows = 16;  // the most rows of one call of sample_rows

// The options of one row, in the types in which the kernel computes with them.
struct SampleOptions {
  float inverse;  // 1 / temperature; 1 for a greedy row
  bool greedy;
  int64_t top_k;  // 0: all tokens
  double top_p, min_p;
  float repetition, presence, frequency;
  uint64_t seed, position;
  int64_t prompt;  // how many of the first columns of token_ids belong to the prompt
  bool penalised() const { return repetition != 1 || presence != 0 || frequency != 0; }
};

// What is wrong with a row; its outputs are not written.
enum class SampleFault : int32_t { none, logits, overflow, nothing_left };

struct Sample {
  Dtype dtype;
  const void* logits;
  int64_t stride, vocab;
  const SampleOptions* options;  // [rows]
  In token_ids, bias_ids;        // [rows, history], [rows, biases]; -1: no token. data null: none
  int64_t history, biases;
  const float* bias_values;  // [rows, biases]
  const uint32_t* allowed_bits;  // [rows, (vocab + 31) / 32], bit j of word i is token 32 i + j; may be null
  const uint8_t* allowed_bytes;  // [rows, vocab], may be null
  int64_t allowed_stride;        // between rows, in words or bytes
  int64_t top;                   // how many of the most probable tokens are reported
  // Results, [rows] or [rows, top]; filtered may be null.
  int64_t *tokens, *top_ids;
  float *logprobs, *top_logprobs, *filtered;
  SampleFault* faults;  // [rows]
};

// The scratch memory of one thread: its bytes, and its preparation before the first call of sample_rows.
INTERNLM2_CPU_KERNELS(
  int64_t sample_scratch(const Sample& a);
  void sample_prepare(const Sample& a, void* scratch);
  void sample_rows(const Sample& a, int64_t begin, int64_t end, void* scratch);)

}  // namespace internlm2
