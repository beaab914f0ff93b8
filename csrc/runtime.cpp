#include "runtime.h"

#include <pthread.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace internlm2 {
namespace {

// Whether the processor has AMX tiles and their bfloat16 products, and the operating system saves and restores the tiles.
bool tiles_offered() {
#if defined(INTERNLM2_EMULATE_AMX)
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile)) != (bf16 | tile)) return false;
  constexpr long supported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  constexpr uint64_t states = 3u << 17;  // XFEATURE_XTILECFG and XFEATURE_XTILEDATA
  uint64_t mask = 0;
  return syscall(SYS_arch_prctl, supported, &mask) == 0 && (mask & states) == states;
#else
  return false;
#endif
}

// Asks the operating system for permission to use AMX tiles. The permission holds for the whole process until it ends, and each
// thread's signal frame grows by the 8 KiB of the tiles. So it is asked for at the first call of an operator, not at loading.
bool tiles_permitted() {
#if defined(__x86_64__) && defined(__linux__) && !defined(INTERNLM2_EMULATE_AMX)
  constexpr long request = 0x1023, data = 18;  // request is ARCH_REQ_XCOMP_PERM, data is XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, data) == 0;
#else
  return true;
#endif
}

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // also checks that the operating system saves the vector registers
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) {
    return Isa::none;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return Isa::avx2;
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (!bf16) return Isa::avx512;
  return tiles_offered() ? Isa::amx : Isa::avx512_bf16;
#else
  return Isa::none;
#endif
}

Isa initial() {  // follows torch's own environment variable, so that one variable limits torch and this library alike
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  const Isa best = best_isa();
  if (wanted != nullptr && best >= Isa::avx512 && (!std::strcmp(wanted, "avx2") || !std::strcmp(wanted, "default"))) {
    return Isa::avx2;
  }
  return best == Isa::amx && !tiles_permitted() ? Isa::avx512_bf16 : best;
}

std::atomic<int>& current() {
  static std::atomic<int> value{static_cast<int>(initial())};
  return value;
}

std::atomic<bool> forked{false};

std::map<std::string, std::string>& signature_map() {
  static std::map<std::string, std::string> map;
  return map;
}

constexpr int kDevices = 64;

std::array<std::atomic<int*>, kDevices>& error_words() {
  static std::array<std::atomic<int*>, kDevices> words{};
  return words;
}

std::function<void(int)>& error_word_maker() {
  static std::function<void(int)> maker;
  return maker;
}

const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

}  // namespace

Isa isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

bool set_isa(const std::string& name) {
  for (Isa value : {Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
    if (name == isa_name(value) && value <= best_isa() && (value != Isa::amx || tiles_permitted())) {
      current().store(static_cast<int>(value));
      return true;
    }
  }
  return false;
}

const char* isa_name(Isa value) {
  switch (value) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
    default: return "";
  }
}

bool in_forked_child() {
  (void)fork_handler;
  return forked.load(std::memory_order_relaxed);
}

void set_error_word(int device, int* word) {
  if (device >= 0 && device < kDevices) error_words()[device].store(word);
}

void set_error_word_maker(std::function<void(int)> maker) { error_word_maker() = std::move(maker); }

int* error_word(int device) {
  if (device < 0 || device >= kDevices) throw std::runtime_error("internlm2_kernels: more CUDA devices than are known");
  if (error_words()[device].load() == nullptr && error_word_maker()) error_word_maker()(device);
  int* word = error_words()[device].load();
  if (word == nullptr) throw std::runtime_error("internlm2_kernels: this device has no error word");
  return word;
}

void record_signature(const std::string& overload, const std::string& signature) { signature_map()[overload] = signature; }

const std::map<std::string, std::string>& signatures() { return signature_map(); }

}  // namespace internlm2
