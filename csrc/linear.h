// A product of matrices with one order of sums, C[i][j] = sum over l of A(i, l) B(l, j): the arguments that the binding passes
// to the kernels, as raw pointers. `linear` and both its gradients are such products. Method: csrc/cpu/gemm/linear.cpp.
#pragma once
#include "types.h"

namespace internlm2 {

constexpr int64_t kLinearPackRows = 48;  // rows of A in one tile of linear_pack
constexpr int64_t kLinearPiece = 32;     // pieces of the sum hold a multiple of this many indices

// Into how many pieces a sum of k indices is cut. A piece costs about as much as 10 of its indices, so that none is shorter
// than 512. The heads over a vocabulary use this rule; for `linear` itself internlm2_kernels/ops/linear.py holds the same one.
inline int64_t linear_pieces(int64_t k) { return k >= 4096 ? 8 : k >= 2048 ? 4 : k >= 1024 ? 2 : 1; }

// How many of k indices of a sum a piece holds, where they are cut into `pieces`.
inline int64_t linear_piece(int64_t k, int64_t pieces) {
  const int64_t each = (k + pieces - 1) / pieces;
  return (each > kLinearPiece ? (each + kLinearPiece - 1) / kLinearPiece : 1) * kLinearPiece;
}

// A matrix as an operand: the sum runs along the rows of the tensor (`along`), or over its rows.
struct LinearOperand {
  Dtype dtype;
  const void* data;
  int64_t stride;  // between rows
  bool along;
};

struct LinearProduct {
  Dtype dtype;         // of A; B is rounded to it where B has another
  LinearOperand a, b;  // A [m, k], B [k, n]
  int64_t m, n, k;
  int64_t piece;  // indices of the sum in a piece, a multiple of kLinearPiece
  bool tree;      // whether the pieces are added in a balanced tree, or one after the other
  // The result [m, n]: C + bias + residual, rounded once. Null: without.
  Dtype out_dtype, bias_dtype;
  void* out;
  int64_t out_stride;
  const void *bias, *residual;  // [n]; [m, n] in out_dtype
  int64_t residual_stride;
  // The rows of A that are computed together, [first, first + rows), the most of them in one call, for which scratch memory is
  // laid out, and the memory for them packed.
  int64_t first, rows, capacity;
  void* a_packed;
};

// rows: the most rows of A that are computed together. row_bytes: bytes of each, packed; 0: they are not packed. scratch: bytes
// of a thread's scratch memory for `capacity` rows. panel: columns of C in a tile of linear_tile.
struct LinearSizes { int64_t rows, row_bytes, scratch, panel; };

// The gradient of the bias: dbias[j] = sum of dy[i][j] over the rows, in the accumulator's dtype.
struct LinearBias {
  Dtype dtype;
  const void* dy;
  void* dbias;
  int64_t rows, cols, stride;
};

INTERNLM2_CPU_MATRIX_KERNELS(
  LinearSizes linear_sizes(const LinearProduct& a);
  void linear_pack(const LinearProduct& a, int64_t tile);
  void linear_tile(const LinearProduct& a, int64_t tile, void* scratch);)
// Columns [begin, end) of dbias.
INTERNLM2_CPU_KERNELS(void linear_dbias(const LinearBias& a, int64_t begin, int64_t end);)

}  // namespace internlm2
