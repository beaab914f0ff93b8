// CUDA on a CPU, slowly: every CUDA thread of a block is a thread of the CPU, and blocks run one after the other. It covers
// enough of the language for csrc/cuda to be compiled by g++ and checked bit by bit where there is no GPU. It cannot show
// races between blocks, effects of the GPU's memory model, or speed.
#pragma once
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace emulator {

struct Index { unsigned x = 0, y = 0, z = 0; };
struct Block {
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<uint32_t> lanes;  // what each thread offers to the others of its warp
  explicit Block(int threads) : all(threads), lanes(threads + 32) {
    for (int first = 0; first < threads; first += 32) {
      warps.push_back(std::make_unique<std::barrier<>>(std::min(32, threads - first)));
    }
  }
};
inline thread_local Block* block;
inline thread_local int thread;
inline thread_local Index thread_index, block_index, block_size, grid_size;

template <typename F> void launch(unsigned grid, dim3 size, const F& kernel) {
  const int threads = static_cast<int>(size.x * size.y * size.z);
  Block shared(threads);
  std::barrier<> next(threads);
  std::vector<std::thread> all;
  for (int t = 0; t < threads; ++t) {
    all.emplace_back([&, t] {
      block = &shared;
      thread = t;
      block_size = {size.x, size.y, size.z};
      grid_size = {grid, 1, 1};
      thread_index = {t % size.x, t / size.x, 0};
      for (unsigned b = 0; b < grid; ++b) {
        block_index = {b, 0, 0};
        kernel();
        next.arrive_and_wait();  // shared memory is a `static` variable here, which only one block may use at a time
      }
    });
  }
  for (std::thread& t : all) t.join();
}

template <typename To, typename From> To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof(To));
  return out;
}

}  // namespace emulator

#define threadIdx ::emulator::thread_index
#define blockIdx ::emulator::block_index
#define blockDim ::emulator::block_size
#define gridDim ::emulator::grid_size
#undef __shared__
#define __shared__ static
#undef __forceinline__
#define __forceinline__ inline
#undef __launch_bounds__
#define __launch_bounds__(...)
#define cudaGetLastError() cudaSuccess
#define cudaGetErrorString(error) "emulated"

inline void __syncthreads() { emulator::block->all.arrive_and_wait(); }
template <typename T> T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  std::barrier<>& warp = *emulator::block->warps[emulator::thread / 32];
  emulator::block->lanes[emulator::thread] = emulator::bits<uint32_t>(value);
  warp.arrive_and_wait();
  const T out = emulator::bits<T>(emulator::block->lanes[emulator::thread ^ lane_mask]);
  warp.arrive_and_wait();
  return out;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float a) {
  return std::isnan(a) ? 0 : static_cast<int>(std::nearbyint(std::clamp(a, -2147483648.0f, 2147483520.0f)));
}
inline float __int_as_float(int a) { return emulator::bits<float>(a); }
inline float __uint_as_float(unsigned a) { return emulator::bits<float>(a); }
inline unsigned __float_as_uint(float a) { return emulator::bits<unsigned>(a); }
inline int atomicOr(int* p, int value) { return std::atomic_ref<int>(*p).fetch_or(value); }
using std::max;
using std::min;
