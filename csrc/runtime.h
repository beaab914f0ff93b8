// State of the running process: the instruction set in use, whether this is a forked child, what was registered.
#pragma once
#include <functional>
#include <map>
#include <string>

namespace internlm2 {

// Instruction sets in rising order; each includes the one before. avx512_bf16 adds products of bfloat16 pairs (VDPBF16PS) and
// of bytes (VNNI) to avx512, and amx adds products of bfloat16 in AMX tiles.
enum class Isa : int { none = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

Isa isa();                                // in use now
Isa best_isa();                           // the most this processor and operating system offer
bool set_isa(const std::string& name);    // false where the processor lacks it or the system does not permit it
const char* isa_name(Isa value);          // "", "avx2", "avx512", "avx512_bf16", "amx"

bool in_forked_child();

// The error word of a CUDA device: an int32 in its memory in which kernels set a DeviceError bit for an index out of range.
// maker(device) allocates it at the first use and passes it to set_error_word.
void set_error_word(int device, int* word);
void set_error_word_maker(std::function<void(int)> maker);
int* error_word(int device);  // throws if there is no maker

void record_signature(const std::string& overload, const std::string& signature);
const std::map<std::string, std::string>& signatures();

}  // namespace internlm2

// Calls the build of a CPU kernel for the instruction set in use: AVX2 or AVX-512.
#define INTERNLM2_CPU(kernel, ...) \
  (::internlm2::isa() >= ::internlm2::Isa::avx512 ? cpu::AVX512::kernel(__VA_ARGS__) : cpu::AVX2::kernel(__VA_ARGS__))
// Calls the build of a kernel that is made of matrix products (its source file begins with `Built for:`). `args` is a struct
// with a dtype. Besides AVX2 and AVX-512 there is a build with bfloat16 products, and for bfloat16 tensors one with AMX tiles.
#define INTERNLM2_CPU_MATRIX(kernel, args, ...)                                                                      \
  (::internlm2::isa() >= ::internlm2::Isa::amx && (args).dtype == ::internlm2::Dtype::bf16                           \
       ? cpu::AMX::kernel(args, ##__VA_ARGS__)                                                                       \
   : ::internlm2::isa() >= ::internlm2::Isa::avx512_bf16 ? cpu::AVX512_BF16::kernel(args, ##__VA_ARGS__)             \
                                                         : INTERNLM2_CPU(kernel, args, ##__VA_ARGS__))
