// Loops of elementwise kernels over contiguous tensors of any floating-point dtype. The kernel sees blocks of kBlock elements
// in the accumulator's type, whatever the dtypes of the tensors.
#pragma once
#include <utility>

#include "dispatch.h"
#include "simd/mask.h"

namespace internlm2 { namespace cpu { namespace CPU_CAPABILITY { namespace {

constexpr int64_t kBlock = 512;  // elements converted to the accumulator's type at a time, so that they stay in cache

template <typename Acc> constexpr Dtype kDtype = sizeof(Acc) == 4 ? Dtype::f32 : Dtype::f64;

// Converts n elements from p on to Acc.
template <typename Acc, typename T> void widen_block(const T* p, int64_t n, Acc* buffer) {
  if constexpr (std::is_same_v<Acc, float> && !std::is_same_v<T, double>) {
    for_vectors<Vec<float>, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
      store(buffer + j, load<Vec<float>>(p + j, lanes), lanes);
    });
  } else {
    for (int64_t j = 0; j < n; ++j) buffer[j] = static_cast<Acc>(to_acc(p[j]));
  }
}
// Returns elements [i, i + n) of a tensor as Acc: in place where that is its dtype, otherwise converted into `buffer`.
template <typename Acc> const Acc* block_of(const In& in, int64_t i, int64_t n, Acc* buffer) {
  if (in.dtype == kDtype<Acc>) return static_cast<const Acc*>(in.data) + i;
  switch (in.dtype) {
    case Dtype::bf16: widen_block(static_cast<const bf16*>(in.data) + i, n, buffer); break;
    case Dtype::f16: widen_block(static_cast<const f16*>(in.data) + i, n, buffer); break;
    case Dtype::f32: widen_block(static_cast<const float*>(in.data) + i, n, buffer); break;
    default: widen_block(static_cast<const double*>(in.data) + i, n, buffer); break;
  }
  return buffer;
}

// Returns where the kernel writes the elements of a result from i on as Acc: into the tensor where Acc is its dtype, otherwise
// into `buffer`, which put_block then rounds into the tensor. Null for a tensor without data, which is not needed.
template <typename Acc> Acc* block_of(const Out& out, int64_t i, int64_t, Acc* buffer) {
  if (out.data == nullptr) return nullptr;
  return out.dtype == kDtype<Acc> ? static_cast<Acc*>(out.data) + i : buffer;
}
template <typename T> void round_block(const float* from, int64_t n, T* p) {
  for_vectors<Vec<float>, Single>(n, [&](int64_t j, auto lanes) VEC_LAMBDA {
    store(p + j, load<Vec<float>>(from + j, lanes), lanes);
  });
}
inline void put_block(const Out& out, int64_t i, int64_t n, const float* from) {
  if (out.data == nullptr) return;
  if (out.dtype == Dtype::bf16) round_block(from, n, static_cast<bf16*>(out.data) + i);
  if (out.dtype == Dtype::f16) round_block(from, n, static_cast<f16*>(out.data) + i);
}
inline void put_block(const Out&, int64_t, int64_t, const double*) {}  // written in place: the result is a double tensor
template <typename Acc> void put_block(const In&, int64_t, int64_t, const Acc*) {}

// Divides [begin, end) into blocks and calls body(i, n, blocks...) for each, with its first element i and its length n <=
// kBlock. `blocks` are pointers to the block in each of `tensors`: const Acc* for an In, Acc* for an Out.
template <typename Acc, typename F, size_t... k, typename... Tensors>
VEC_INLINE void for_blocks(std::index_sequence<k...>, int64_t begin, int64_t end, const F& body, const Tensors&... tensors) {
  Acc buffers[sizeof...(k)][kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    const auto run = [&](auto*... blocks) VEC_LAMBDA {
      body(i, n, blocks...);
      (put_block(tensors, i, n, blocks), ...);
    };
    run(block_of(tensors, i, n, buffers[k])...);
  }
}
template <typename Acc, typename F, typename... Tensors>
VEC_INLINE void for_blocks(int64_t begin, int64_t end, const F& body, const Tensors&... tensors) {
  for_blocks<Acc>(std::index_sequence_for<Tensors...>(), begin, end, body, tensors...);
}

}}}}  // namespace internlm2::cpu::CPU_CAPABILITY::(unnamed)
