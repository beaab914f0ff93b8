// Launches of the kernels of rms_norm.cuh: chooses the shape of a block from the number of columns and the dtype.
#include "rms_norm.cuh"

namespace internlm2 { namespace cuda {
namespace {

// threads: for each row. pieces: those of a row that a thread keeps in registers; 0: the row is too long to be kept. rows: of a
// block.
struct Shape {
  int threads, pieces, rows;
};

// `piece` is the number of elements of a piece, `most` the most pieces that a thread may keep. A row of up to 32 * most pieces
// gets one warp. A longer row gets a block of up to 512 threads, which keep 2 pieces each where `most` allows, or 4 where
// needed.
Shape shape_of(int64_t cols, int piece, int most) {
  const int64_t pieces = ceil_div(cols, piece);
  for (int kept = 1; kept <= most; kept *= 2) {
    if (pieces <= 32 * kept) return {32, kept, 4};
  }
  for (int kept = most > 1 ? 2 : 1; kept <= most; kept *= 2) {  // starts at 2: two loads in flight hide more latency than one
    if (pieces <= 512 * kept) return {static_cast<int>(ceil_div(ceil_div(pieces, kept), 32) * 32), kept, 1};
  }
  return {512, 0, 1};
}

template <typename T> Shape forward_shape(int64_t cols) { return shape_of(cols, kPiece<T>, 4); }
// The backward keeps weight, dweight, dy and h in registers. There are enough for four pieces of each only for float, whose
// pieces have 4 elements; pieces of 16-bit types have 8.
Shape backward_shape(Dtype dtype, int64_t cols) {
  return dtype == Dtype::f32 ? shape_of(cols, kPiece<float>, 4) : shape_of(cols, kPiece<__half>, 2);
}

template <typename T, typename W> void forward(const RmsNormFwd& a, cudaStream_t stream) {
  const bool wide = a.cols % kPiece<T> == 0 && aligned(a.x) && aligned(a.y) && aligned(a.weight) && aligned<T>(a.x_rows) &&
                    (a.residual == nullptr || (aligned(a.residual) && aligned(a.h) && aligned<T>(a.residual_rows)));
  const Shape s = forward_shape<T>(a.cols);
  const dim3 block(s.threads, s.rows);
  const unsigned grid = grid_for(ceil_div(a.x_rows.count(), s.rows));
  switch (s.pieces) {
    case 1: rms_norm_fwd_kernel<T, W, 1><<<grid, block, 0, stream>>>(a, wide); break;
    case 2: rms_norm_fwd_kernel<T, W, 2><<<grid, block, 0, stream>>>(a, wide); break;
    case 4: rms_norm_fwd_kernel<T, W, 4><<<grid, block, 0, stream>>>(a, wide); break;
    default: rms_norm_fwd_kernel<T, W, 0><<<grid, block, 0, stream>>>(a, wide);
  }
}

template <typename T, typename W> void backward(const RmsNormBwd& a, int64_t chunks, cudaStream_t stream) {
  const bool wide = a.cols % kPiece<T> == 0 && aligned(a.dy) && aligned(a.h) && aligned(a.dx) && aligned(a.weight) &&
                    aligned<T>(a.dy_rows) && aligned<T>(a.h_rows) &&
                    (a.dresidual == nullptr || (aligned(a.dresidual) && aligned<T>(a.dresidual_rows))) &&
                    (a.dweight == nullptr || aligned(a.partial));
  const Shape s = backward_shape(a.dtype, a.cols);
  const dim3 block(s.threads, s.rows);
  const unsigned grid = static_cast<unsigned>(ceil_div(chunks, s.rows));
  switch (s.pieces) {
    case 1: rms_norm_bwd_kernel<T, W, 1><<<grid, block, 0, stream>>>(a, chunks, wide); break;
    case 2: rms_norm_bwd_kernel<T, W, 2><<<grid, block, 0, stream>>>(a, chunks, wide); break;
    case 4:
      if constexpr (sizeof(T) == 4) rms_norm_bwd_kernel<T, W, 4><<<grid, block, 0, stream>>>(a, chunks, wide);
      break;
    default: rms_norm_bwd_long_kernel<T, W><<<grid, block, 0, stream>>>(a, wide);
  }
}

}  // namespace

const char* rms_norm_fwd(const RmsNormFwd& a, void* stream) {
  if (a.x_rows.count() == 0) return nullptr;
  WITH_CUDA_STORAGE(a.dtype, T, {
    if (a.weight_dtype == a.dtype) {
      forward<T, T>(a, static_cast<cudaStream_t>(stream));
    } else if constexpr (sizeof(T) == 2) {
      forward<T, float>(a, static_cast<cudaStream_t>(stream));
    }
  })
  return launch_error();
}

// Chooses as many chunks as keep a large GPU busy in one wave: 65536 threads in all, but at least 256 chunks. Returns the rows
// of a chunk.
int64_t rms_norm_bwd_rows_per_chunk(Dtype dtype, int64_t rows, int64_t cols) {
  const int threads = backward_shape(dtype, cols).threads;
  return ceil_div(rows > 0 ? rows : 1, threads < 256 ? 65536 / threads : 256);
}

const char* rms_norm_bwd(const RmsNormBwd& a, int64_t chunks, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (chunks > 0) {
    WITH_CUDA_STORAGE(a.dtype, T, {
      if (a.weight_dtype == a.dtype) {
        backward<T, T>(a, chunks, s);
      } else if constexpr (sizeof(T) == 2) {
        backward<T, float>(a, chunks, s);
      }
    })
  }
  if (a.dweight != nullptr) {
    const dim3 block(kColumns, kSlices);
    const unsigned grid = static_cast<unsigned>(ceil_div(a.cols, kColumns));
    WITH_CUDA_STORAGE(a.weight_dtype, W, { rms_norm_bwd_dweight_kernel<W><<<grid, block, 0, s>>>(a, chunks); })
  }
  return launch_error();
}

}}  // namespace internlm2::cuda
