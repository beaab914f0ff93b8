// Launches of the kernels of qkv_rope.cuh. A block has at most 256 threads. In x it has one thread for each piece of half a
// head, and in y as many heads as fit.
#include "qkv_rope.cuh"

namespace internlm2 { namespace cuda {
namespace {

dim3 block_of(int64_t half, int piece, int64_t heads) {
  const int64_t pieces = ceil_div(half, piece);
  const unsigned x = static_cast<unsigned>(pieces < 256 ? pieces : 256);
  unsigned y = 256 / x;
  if (y > heads) y = static_cast<unsigned>(heads);
  while (x * y % 32 != 0 && x * (y + 1) <= 256) ++y;  // whole warps where possible: quantize() is done by warps
  return dim3(x, y);
}

template <typename T> bool wide_tables(const RopeAngles& a) {
  return a.half % kPiece<T> == 0 && aligned(a.cos) && aligned(a.sin);
}

template <typename T> bool aligned_heads(const Heads& h) {
  return aligned(h.data) && h.token_stride % kPiece<T> == 0 && h.head_stride % kPiece<T> == 0;
}

template <typename T> void forward(const QkvRopeFwd& a, int64_t tokens, int* error, cudaStream_t stream) {
  const bool wide = wide_tables<T>(a.angles) && aligned(a.qkv) && a.token_stride % kPiece<T> == 0 && aligned(a.q) &&
                    aligned(a.k) && aligned(a.v) &&
                    (a.slots == nullptr || a.quantized || (aligned(a.k_cache) && aligned(a.v_cache)));
  const dim3 block = block_of(a.angles.half, kPiece<T>, a.groups * (a.group + 2));
  if (a.slots != nullptr) {
    qkv_rope_fwd_kernel<T, kPiece<T>, true><<<grid_for(tokens), block, 0, stream>>>(a, tokens, error, wide);
  } else {
    qkv_rope_fwd_kernel<T, kPiece<T>, false><<<grid_for(tokens), block, 0, stream>>>(a, tokens, error, wide);
  }
}

template <typename T> void backward(const QkvRopeBwd& a, int64_t tokens, int* error, cudaStream_t stream) {
  const bool wide = wide_tables<T>(a.angles) && aligned_heads<T>(a.dq) && aligned_heads<T>(a.dk) &&
                    aligned_heads<T>(a.dv) && aligned(a.dqkv);
  const dim3 block = block_of(a.angles.half, kPiece<T>, a.dq.heads + 2 * a.dk.heads);
  qkv_rope_bwd_kernel<T, kPiece<T>><<<grid_for(tokens), block, 0, stream>>>(a, tokens, error, wide);
}

}  // namespace

const char* qkv_rope_fwd(const QkvRopeFwd& a, int64_t tokens, int* error, void* stream) {
  if (tokens == 0) return nullptr;
  WITH_CUDA_STORAGE(a.dtype, T, { forward<T>(a, tokens, error, static_cast<cudaStream_t>(stream)); })
  return launch_error();
}

const char* qkv_rope_bwd(const QkvRopeBwd& a, int64_t tokens, int* error, void* stream) {
  if (tokens == 0) return nullptr;
  WITH_CUDA_STORAGE(a.dtype, T, { backward<T>(a, tokens, error, static_cast<cudaStream_t>(stream)); })
  return launch_error();
}

}}  // namespace internlm2::cuda
