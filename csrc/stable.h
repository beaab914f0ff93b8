// The only header through which this library uses libtorch. It uses torch's stable ABI at version 2.10 alone, so that one
// binary serves every torch from 2.10 on. Bindings include it. Kernels never do: they see raw pointers and the types of
// types.h.
#pragma once
#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#endif
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "runtime.h"
#include "types.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace internlm2 {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return Dtype::f32;
    case torch::headeronly::ScalarType::BFloat16: return Dtype::bf16;
    case torch::headeronly::ScalarType::Half: return Dtype::f16;
    case torch::headeronly::ScalarType::Double: return Dtype::f64;
    case torch::headeronly::ScalarType::Int: return Dtype::i32;
    case torch::headeronly::ScalarType::Long: return Dtype::i64;
    case torch::headeronly::ScalarType::Char: return Dtype::i8;
    default: STD_TORCH_CHECK(false, "internlm2_kernels: unsupported dtype");
  }
}

// The dtype in which sums and statistics of `t` are kept.
inline torch::headeronly::ScalarType accumulator_of(const Tensor& t) {
  return t.scalar_type() == torch::headeronly::ScalarType::Double ? torch::headeronly::ScalarType::Double
                                                                  : torch::headeronly::ScalarType::Float;
}

inline Dtype accumulator_tag(const Tensor& t) { return dtype_of(t) == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// A tensor as rows along its last dimension. The public functions guarantee that the last stride is 1 and that two strides
// suffice for the other dimensions together.
inline Rows rows_of(const Tensor& t) {
  const int64_t dim = t.dim();
  STD_TORCH_CHECK(dim >= 1 && (t.size(dim - 1) <= 1 || t.stride(dim - 1) == 1 || t.numel() == 0),
                  "internlm2_kernels: the last dimension must have stride 1, got ", t.stride(dim - 1));
  if (t.numel() == 0) return {0, 1, 0, 0};
  if (dim == 1) return {1, 1, 0, 0};
  if (dim == 2) return {t.size(0), 1, t.stride(0), 0};
  if (dim == 3) {
    if (t.stride(0) == t.size(1) * t.stride(1)) return {t.size(0) * t.size(1), 1, t.stride(1), 0};
    return {t.size(0), t.size(1), t.stride(0), t.stride(1)};
  }
  STD_TORCH_CHECK(t.is_contiguous(), "internlm2_kernels: more than two leading strides");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < dim; ++i) rows *= t.size(i);
  return {rows, 1, t.size(dim - 1), 0};
}

// Views of contiguous tensors of one dimension, to read (In) and to write (Out).
inline In in_of(const Tensor& t) { return {dtype_of(t), t.const_data_ptr()}; }
inline Out out_of(const Tensor& t) { return {dtype_of(t), t.mutable_data_ptr()}; }

inline Tensor empty_as(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

inline void check_cpu() {
  STD_TORCH_CHECK(isa() != Isa::none, "internlm2_kernels: the cpp backend needs a processor with AVX2, FMA and F16C");
}

inline void* data(const Tensor& t) { return t.mutable_data_ptr(); }
inline const void* cdata(const Tensor& t) { return t.const_data_ptr(); }

#ifdef INTERNLM2_CUDA
// Makes the tensor's device current for a scope and holds its current stream. The stable ABI itself gives the handle of a
// stream only from 2.13 on. aoti_torch_get_current_cuda_stream is older; in a CPU build of torch its (weak) address is null.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "internlm2_kernels: this torch was built without CUDA");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_) == 0, "internlm2_kernels: no current CUDA stream");
  }
  int device() const { return device_; }
  void* stream() const { return stream_; }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline void check_cuda_dtype(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() != torch::headeronly::ScalarType::Double,
                  "internlm2_kernels: the cuda backend takes float32, bfloat16 and float16, not float64");
}

inline void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, "internlm2_kernels: CUDA: ", error); }
#endif

// Registration. The dispatcher never compares the types of an operator's schema with those of the C++ function. Therefore
// INTERNLM2_IMPL records the types of each function it registers, and a test compares them with the schema.
template <typename T> struct TypeName;
template <> struct TypeName<Tensor> { static std::string get() { return "Tensor"; } };
template <> struct TypeName<OptTensor> { static std::string get() { return "Tensor?"; } };
template <> struct TypeName<std::vector<Tensor>> { static std::string get() { return "Tensor[]"; } };
template <> struct TypeName<std::vector<int64_t>> { static std::string get() { return "int[]"; } };
template <> struct TypeName<double> { static std::string get() { return "float"; } };
template <> struct TypeName<int64_t> { static std::string get() { return "int"; } };
template <> struct TypeName<bool> { static std::string get() { return "bool"; } };
template <> struct TypeName<void> { static std::string get() { return "()"; } };
template <typename... T> struct TypeName<std::tuple<T...>> {
  static std::string get() {
    std::string all;
    ((all += (all.empty() ? "" : ", ") + TypeName<T>::get()), ...);
    return "(" + all + ")";
  }
};
template <typename R, typename... A>
std::string signature_of(R (*)(A...)) {
  return TypeName<std::tuple<std::decay_t<A>...>>::get() + " -> " + TypeName<R>::get();
}

}  // namespace internlm2

#define INTERNLM2_IMPL(library, name, function)                                                  \
  ::internlm2::record_signature(name, ::internlm2::signature_of(&function)); \
  library.impl(name, TORCH_BOX(&function))
