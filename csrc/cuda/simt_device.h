// simt.h for nvcc.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

// Assertions of kernels are errors of a user's data, not of the build.
#undef NDEBUG
#include <cassert>

#define CPO_DEVICE __device__ __forceinline__
// For at most so many threads a block, with registers for so many blocks on a multiprocessor.
#define CPO_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define CPO_UNROLL _Pragma("unroll")

namespace cpo::simt {

constexpr unsigned kAllLanes = 0xffffffffu;

CPO_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
CPO_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
CPO_DEVICE std::int64_t block_index() { return blockIdx.x; }
CPO_DEVICE std::int64_t block_count() { return gridDim.x; }

CPO_DEVICE void block_barrier() { __syncthreads(); }
CPO_DEVICE bool block_any(bool value) { return __syncthreads_or(value) != 0; }

// Of a cooperative launch: what any block has written before, every block sees after it.
CPO_DEVICE void grid_barrier() { cooperative_groups::this_grid().sync(); }

template <class T>
CPO_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

// The dynamic shared memory of the block, as a struct.
template <class T>
CPO_DEVICE T& shared_memory() {
  extern __shared__ __align__(16) unsigned char cpo_shared_memory[];
  return *reinterpret_cast<T*>(cpo_shared_memory);
}

// 16 or 8 aligned bytes, loaded and stored by one instruction.
struct alignas(16) Words4 {
  std::uint32_t word[4];
};
struct alignas(8) Words2 {
  std::uint32_t word[2];
};

template <class T>
CPO_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
CPO_DEVICE void store(T* p, T value) {
  *p = value;
}
CPO_DEVICE Words4 load(const Words4* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
// In PTX: the compiler may split the store of a struct into four.
CPO_DEVICE void store(Words4* p, const Words4& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
CPO_DEVICE void store(Words2* p, const Words2& v) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.word[0]), "r"(v.word[1]) : "memory");
}

// 2^x to 2 ulp, 0 for results below 2^-126.
CPO_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

CPO_DEVICE float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// An error that names the token, in the words of the host's check.
CPO_DEVICE void stop_at_target(std::int64_t token, std::int64_t target, std::int64_t vocab) {
  printf("target of token %lld is %lld, expected [0, %lld) or -100\n", static_cast<long long>(token), static_cast<long long>(target),
         static_cast<long long>(vocab));
  assert(!"a target is out of range; the line on standard output names it");
}

CPO_DEVICE float float_of_bits(std::uint32_t bits) { return __uint_as_float(bits); }
CPO_DEVICE std::uint32_t bits_of_float(float x) { return __float_as_uint(x); }

// Two numbers in a word, the first in its lower half; each rounded to nearest even.
CPO_DEVICE std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

CPO_DEVICE std::uint32_t pack_f16(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

CPO_DEVICE float f16_to_float(std::uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// A one-dimensional grid on a stream, which is a cudaStream_t.
struct Grid {
  std::int64_t blocks;
  int threads;
  std::size_t shared_bytes;
  void* stream;
};

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline cudaLaunchConfig_t launch_config(const Grid& grid, const char* name) {
  if (grid.blocks > 0x7fffffff) throw std::invalid_argument(std::string(name) + ": more than 2^31 - 1 blocks");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(grid.stream);
  return config;
}

template <class... Parameters, class... Arguments>
void launch(const Grid& grid, const char* name, void (*kernel)(Parameters...), const Arguments&... arguments) {
  const cudaLaunchConfig_t config = launch_config(grid, name);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

// With grid barriers: of the grid's blocks, no more than the device runs at a time.
template <class... Parameters, class... Arguments>
void launch_cooperative(Grid grid, int device, const char* name, void (*kernel)(Parameters...), const Arguments&... arguments) {
  int multiprocessors = 0, resident = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), name);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, grid.threads, grid.shared_bytes), name);
  grid.blocks = std::min<std::int64_t>(grid.blocks, static_cast<std::int64_t>(multiprocessors) * resident);
  cudaLaunchConfig_t config = launch_config(grid, name);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

}  // namespace cpo::simt
