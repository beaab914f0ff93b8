// RMS normalization on CUDA. blockDim.x threads share a row, and thread x takes its 16-byte pieces x, x + blockDim.x, and so
// on. blockDim.x and kPieces follow from the number of columns and the dtype alone, so that the bits of a row do not depend on
// other rows. A row needs two passes, one for its sum and one for its result. Between them each thread keeps up to kPieces
// pieces in registers; with kPieces = 0 the row is read from memory twice.
#pragma once
#include "../rms_norm.h"
#include "common.cuh"

namespace internlm2 { namespace cuda { namespace {

template <typename T> __device__ __forceinline__ const T* row_of(const void* p, const Rows& rows, int64_t row) {
  return static_cast<const T*>(p) + rows.offset(row);
}

// Returns one piece of h, which is x or x + residual, and adds the squares of its elements to `sum`. Stores h where there is a
// residual.
template <typename T>
__device__ __forceinline__ Piece<T> take_piece(const RmsNormFwd& a, const T* x, const T* residual, T* h, int64_t col,
                                               bool wide, float& sum) {
  Piece<T> value;
  load(value, x + col, a.cols - col, wide);
  if (residual != nullptr) {
    Piece<T> other;
    load(other, residual + col, a.cols - col, wide);
#pragma unroll
    for (int j = 0; j < kPiece<T>; ++j) value.v[j] = from_float<T>(to_float(value.v[j]) + to_float(other.v[j]));
    store(h + col, value, a.cols - col, wide);
  }
#pragma unroll
  for (int j = 0; j < kPiece<T>; ++j) {
    const float v = to_float(value.v[j]);
    sum = fmaf(v, v, sum);
  }
  return value;
}

template <typename T, typename W>
__device__ __forceinline__ void finish_piece(const RmsNormFwd& a, const Piece<T>& h, T* y, float rstd, int64_t col, bool wide) {
  Piece<W, kPiece<T>> weight;
  load(weight, static_cast<const W*>(a.weight) + col, a.cols - col, wide);
  Piece<T> out;
#pragma unroll
  for (int j = 0; j < kPiece<T>; ++j) {
    float x_hat = to_float(h.v[j]) * rstd;
    if (a.hf) x_hat = to_float(from_float<T>(x_hat));
    out.v[j] = from_float<T>(x_hat * to_float(weight.v[j]));
  }
  store(y + col, out, a.cols - col, wide);
}

template <typename T, typename W, int kPieces>
__global__ void __launch_bounds__(512) rms_norm_fwd_kernel(const RmsNormFwd a, bool wide) {
  __shared__ float scratch[32];
  const int64_t rows = a.x_rows.count(), step = static_cast<int64_t>(blockDim.x) * kPiece<T>;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const T* x = row_of<T>(a.x, a.x_rows, row);
    const T* residual = a.residual ? row_of<T>(a.residual, a.residual_rows, row) : nullptr;
    T* h = a.residual ? static_cast<T*>(a.h) + row * a.cols : nullptr;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    const int64_t first = static_cast<int64_t>(threadIdx.x) * kPiece<T>;
    float sum = 0.0f;
    Piece<T> kept[kPieces > 0 ? kPieces : 1];
    if constexpr (kPieces > 0) {
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        if (first + k * step < a.cols) kept[k] = take_piece(a, x, residual, h, first + k * step, wide, sum);
      }
    } else {
      for (int64_t col = first; col < a.cols; col += step) take_piece(a, x, residual, h, col, wide, sum);
    }
    const float rstd = 1.0f / sqrtf(sum_over_x(sum, scratch) / static_cast<float>(a.cols) + static_cast<float>(a.eps));
    if (threadIdx.x == 0) static_cast<float*>(a.rstd)[row] = rstd;
    if constexpr (kPieces > 0) {
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        if (first + k * step < a.cols) finish_piece<T, W>(a, kept[k], y, rstd, first + k * step, wide);
      }
    } else {
      const T* source = a.residual ? h : x;  // without a barrier: a thread reads only those elements of h that it wrote
      for (int64_t col = first; col < a.cols; col += step) {
        load(kept[0], source + col, a.cols - col, wide);
        finish_piece<T, W>(a, kept[0], y, rstd, col, wide);
      }
    }
    if (blockDim.x > 32) __syncthreads();  // all have read scratch before the next row writes to it
  }
}

// The first pass of the backward over one piece. With x_hat = h * rstd and g = dy * weight, it adds every g * x_hat to `sum`,
// and dy * x_hat of each column (x_hat rounded to T with `hf`) to that column's element of `dweight`.
template <typename T, typename W>
__device__ __forceinline__ void take_gradient(const Piece<T>& dy, const Piece<T>& h, const Piece<W, kPiece<T>>& weight,
                                              float rstd, bool hf, float& sum, Piece<float, kPiece<T>>& dweight) {
#pragma unroll
  for (int j = 0; j < kPiece<T>; ++j) {
    const float d = to_float(dy.v[j]), x_hat = to_float(h.v[j]) * rstd;
    sum = fmaf(d * x_hat, to_float(weight.v[j]), sum);
    dweight.v[j] += d * (hf ? to_float(from_float<T>(x_hat)) : x_hat);
  }
}

// The second pass: stores one piece of dx = rstd * (g - x_hat * mean) + dresidual, where `mean` is the row's mean of g * x_hat.
template <typename T, typename W>
__device__ __forceinline__ void finish_gradient(const RmsNormBwd& a, const Piece<T>& dy, const Piece<T>& h,
                                                const Piece<W, kPiece<T>>& weight, const T* dresidual, T* dx, float rstd,
                                                float mean, int64_t col, bool wide) {
  Piece<T> other, out;
  if (dresidual != nullptr) load(other, dresidual + col, a.cols - col, wide);
#pragma unroll
  for (int j = 0; j < kPiece<T>; ++j) {
    const float x_hat = to_float(h.v[j]) * rstd;
    float value = (to_float(dy.v[j]) * to_float(weight.v[j]) - x_hat * mean) * rstd;
    if (dresidual != nullptr) value += to_float(other.v[j]);
    out.v[j] = from_float<T>(value);
  }
  store(dx + col, out, a.cols - col, wide);
}

// dx of every row, and dweight summed over the rows of each chunk, in order, into row `chunk` of `partial`. Which rows a chunk
// has depends on the shape and dtype alone. While a row is summed the next one is loaded, if there are enough registers
// (`ahead`).
template <typename T, typename W, int kPieces>
__global__ void __launch_bounds__(512) rms_norm_bwd_kernel(const RmsNormBwd a, int64_t chunks, bool wide) {
  constexpr int n = kPiece<T>;
  __shared__ float scratch[2][32];  // used in turn by even and odd rows, so that one __syncthreads for each row is enough
  const int64_t rows = a.h_rows.count(), step = static_cast<int64_t>(blockDim.x) * n;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * n;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (chunk >= chunks) return;  // only where one warp takes a row (blockDim.y > 1): no barrier waits for the warps that return
  const int64_t last = min(rows, (chunk + 1) * a.rows_per_chunk);
  Piece<W, n> weight[kPieces];
  constexpr bool ahead = kPieces <= 2;
  Piece<T> dy[kPieces], h[kPieces], next_dy[ahead ? kPieces : 1], next_h[ahead ? kPieces : 1];
  Piece<float, n> dweight[kPieces] = {};
  const auto fetch = [&](int64_t row, Piece<T>* to_dy, Piece<T>* to_h) {
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int64_t col = first + k * step;
      if (row >= last || col >= a.cols) continue;
      load(to_dy[k], row_of<T>(a.dy, a.dy_rows, row) + col, a.cols - col, wide);
      load(to_h[k], row_of<T>(a.h, a.h_rows, row) + col, a.cols - col, wide);
    }
  };
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const int64_t col = first + k * step;
    if (col < a.cols) load(weight[k], static_cast<const W*>(a.weight) + col, a.cols - col, wide);
  }
  if constexpr (ahead) fetch(chunk * a.rows_per_chunk, dy, h);
  for (int64_t row = chunk * a.rows_per_chunk; row < last; ++row) {
    if constexpr (ahead) {
      fetch(row + 1, next_dy, next_h);
    } else {
      fetch(row, dy, h);
    }
    const float rstd = static_cast<const float*>(a.rstd)[row];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      if (first + k * step < a.cols) take_gradient<T, W>(dy[k], h[k], weight[k], rstd, a.hf, sum, dweight[k]);
    }
    const float mean = sum_over_x(sum, scratch[row & 1]) / static_cast<float>(a.cols);
    const T* dresidual = a.dresidual ? row_of<T>(a.dresidual, a.dresidual_rows, row) : nullptr;
    T* dx = static_cast<T*>(a.dx) + row * a.cols;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int64_t col = first + k * step;
      if (col < a.cols) finish_gradient<T, W>(a, dy[k], h[k], weight[k], dresidual, dx, rstd, mean, col, wide);
      if constexpr (ahead) {
        dy[k] = next_dy[k];
        h[k] = next_h[k];
      }
    }
  }
  if (a.dweight == nullptr) return;
  float* partial = static_cast<float*>(a.partial) + chunk * a.cols;
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const int64_t col = first + k * step;
    if (col < a.cols) store(partial + col, dweight[k], a.cols - col, wide);
  }
}

// The backward for rows that are too long for the registers of a block: both passes read the row from memory. dweight is summed
// in `partial` in memory; each element of it belongs to one thread, so that no barrier is needed.
template <typename T, typename W>
__global__ void __launch_bounds__(512) rms_norm_bwd_long_kernel(const RmsNormBwd a, bool wide) {
  constexpr int n = kPiece<T>;
  __shared__ float scratch[2][32];
  const int64_t step = static_cast<int64_t>(blockDim.x) * n, first = static_cast<int64_t>(threadIdx.x) * n;
  const int64_t begin = blockIdx.x * a.rows_per_chunk, last = min(a.h_rows.count(), begin + a.rows_per_chunk);
  float* partial = a.dweight ? static_cast<float*>(a.partial) + blockIdx.x * a.cols : nullptr;
  for (int64_t row = begin; row < last; ++row) {
    const T *dy_row = row_of<T>(a.dy, a.dy_rows, row), *h_row = row_of<T>(a.h, a.h_rows, row);
    const float rstd = static_cast<const float*>(a.rstd)[row];
    Piece<T> dy, h;
    Piece<W, n> weight;
    const auto fetch = [&](int64_t col) {
      load(dy, dy_row + col, a.cols - col, wide);
      load(h, h_row + col, a.cols - col, wide);
      load(weight, static_cast<const W*>(a.weight) + col, a.cols - col, wide);
    };
    float sum = 0.0f;
    for (int64_t col = first; col < a.cols; col += step) {
      fetch(col);
      Piece<float, n> dweight = {};
      take_gradient<T, W>(dy, h, weight, rstd, a.hf, sum, dweight);
      if (partial == nullptr) continue;
      Piece<float, n> before = {};
      if (row > begin) load(before, partial + col, a.cols - col, wide);
#pragma unroll
      for (int j = 0; j < n; ++j) dweight.v[j] += before.v[j];
      store(partial + col, dweight, a.cols - col, wide);
    }
    const float mean = sum_over_x(sum, scratch[row & 1]) / static_cast<float>(a.cols);
    const T* dresidual = a.dresidual ? row_of<T>(a.dresidual, a.dresidual_rows, row) : nullptr;
    T* dx = static_cast<T*>(a.dx) + row * a.cols;
    for (int64_t col = first; col < a.cols; col += step) {
      fetch(col);
      finish_gradient<T, W>(a, dy, h, weight, dresidual, dx, rstd, mean, col, wide);
    }
  }
}

constexpr int kColumns = 32, kSlices = 16;

// dweight = sum of `partial` over the chunks. A block takes kColumns columns. Its threads of threadIdx.y = y sum chunks y,
// y + kSlices, ...; then the kSlices sums of a column are added in order.
template <typename W> __global__ void rms_norm_bwd_dweight_kernel(const RmsNormBwd a, int64_t chunks) {
  __shared__ float sums[kSlices][kColumns];
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  const float* partial = static_cast<const float*>(a.partial) + col;
  float sum = 0.0f;
  if (col < a.cols) {
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kSlices) sum += partial[chunk * a.cols];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || col >= a.cols) return;
  for (int y = 1; y < kSlices; ++y) sum += sums[y][threadIdx.x];
  static_cast<W*>(a.dweight)[col] = from_float<W>(sum);
}

}}}  // namespace internlm2::cuda::(unnamed)
