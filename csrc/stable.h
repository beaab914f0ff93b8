// The only way to libtorch: the stable ABI at version 2.10, so that one binary serves every torch from 2.10 on.
// Bindings include this; kernels never do (they see raw pointers and the types of types.h).
#pragma once
#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#endif
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "rope_table.h"
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

// A tensor seen as rows along its last dimension: at most two leading strides, which the public functions guarantee.
inline Rows rows_of(const Tensor& t) {
  const int64_t dim = t.dim();
  STD_TORCH_CHECK(dim >= 1 && (t.size(dim - 1) <= 1 || t.stride(dim - 1) == 1 || t.numel() == 0),
                  "internlm2_kernels: rows are strided");
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

// Contiguous tensors of one dimension; Out also of a fresh tensor of any shape.
inline In in_of(const Tensor& t) { return {dtype_of(t), t.const_data_ptr()}; }
inline Out out_of(const Tensor& t) { return {dtype_of(t), t.mutable_data_ptr()}; }

inline Tensor empty_as(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

inline void check_cpu() {
  STD_TORCH_CHECK(isa() != Isa::none, "internlm2_kernels: the cpp backend needs a processor with AVX2, FMA and F16C");
}

inline void* data(const Tensor& t) { return t.mutable_data_ptr(); }
inline const void* cdata(const Tensor& t) { return t.const_data_ptr(); }

// Rows [0, n) in contiguous chunks, one a thread, on torch's own pool; in a forked child serially, since the pool's
// threads do not exist there. `grain`: rows below which a second thread costs more than it saves.
template <typename F>
inline void for_rows(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain || in_forked_child()) return f(0, n);
  torch::stable::parallel_for(0, n, grain, f);
}

// Threads for so many units of work that are handed out one by one.
inline int64_t workers_for(int64_t units) {
  if (units <= 1 || in_forked_child()) return 1;
  const int64_t threads = torch::stable::get_num_threads();
  return units < threads ? units : threads;
}

// f(unit, worker) for every unit in [0, units), each handed to the next free of `workers` threads in rising order: units of
// unequal cost, the dear ones first. What a unit computes must not depend on its worker.
template <typename F>
inline void for_units(int64_t units, int64_t workers, const F& f) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t worker, int64_t) {
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) f(unit, worker);
  };
  if (workers <= 1) return work(0, 1);
  torch::stable::parallel_for(0, workers, 1, work);
}

// Every index value of a CPU tensor (int32 or int64, contiguous) within [low, high), before anything is written; Python's
// `native` turns the message behind the marker into a ValueError.
inline void check_range(const char* argument, const Tensor& values, int64_t low, int64_t high) {
  const int64_t n = values.numel();
  const bool narrow = values.scalar_type() == torch::headeronly::ScalarType::Int;
  int64_t smallest = low, largest = high - 1;
  const auto scan = [&](const auto* p) {
    auto least = p[0], most = p[0];
    for (int64_t i = 1; i < n; ++i) {
      least = p[i] < least ? p[i] : least;
      most = p[i] > most ? p[i] : most;
    }
    smallest = least;
    largest = most;
  };
  if (n == 0) return;
  narrow ? scan(static_cast<const int32_t*>(cdata(values))) : scan(static_cast<const int64_t*>(cdata(values)));
  STD_TORCH_CHECK(smallest >= low && largest < high, "ValueError: ", argument, ": expected values from ", low,
                  " to ", high - 1, ", got ", smallest < low ? smallest : largest);
}

// cu_seqlens (int32, contiguous, CPU) rises from 0 to `total` by at least `shortest` at a time.
inline void check_lengths(const Tensor& cu_seqlens, int64_t total, int64_t shortest) {
  const auto* p = static_cast<const int32_t*>(cdata(cu_seqlens));
  const int64_t n = cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(n >= 0, "ValueError: cu_seqlens: expected at least one value, got none");
  STD_TORCH_CHECK(p[0] == 0, "ValueError: cu_seqlens: expected values that start at 0, got ", p[0]);
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(int64_t{p[i + 1]} - p[i] >= shortest, "ValueError: cu_seqlens: expected values that ",
                    shortest > 0 ? "rise by at least " + std::to_string(shortest) : std::string("never fall"), ", got ",
                    p[i + 1], " after ", p[i]);
  }
  STD_TORCH_CHECK(p[n] == total, "ValueError: cu_seqlens: expected values that end at ", total, ", got ", p[n]);
}

// Positions outside the tables are refused in the name of `argument`; null: left to the kernel, on a GPU.
inline RopeAngles angles_of(const char* argument, const Tensor& cos, const Tensor& sin, const OptTensor& positions) {
  RopeAngles a{dtype_of(cos), Dtype::i64, cdata(cos), cdata(sin), nullptr, cos.size(0), cos.size(1)};
  if (positions.has_value()) {
    a.positions_dtype = dtype_of(*positions);
    a.positions = cdata(*positions);
    if (argument != nullptr) check_range(argument, *positions, 0, a.length);
  }
  return a;
}

inline Heads heads_of(const Tensor& t) { return {cdata(t), t.size(1), t.stride(0), t.stride(1)}; }

#ifdef INTERNLM2_CUDA
// Makes the tensor's device current for a scope and knows its stream. The stable ABI hands out a stream's handle from 2.13
// on; before, a CUDA torch has the function below, and without one it is null.
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

// ---- registration: the dispatcher never compares a schema's types with C++'s, so each registration records its own.
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
