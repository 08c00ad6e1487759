// Kernels with one mistake each: what the emulator of simt_host.h must find.
#include "cuda/reduce.cuh"

using namespace cpo;
using simt::machine;

namespace {

struct Shared {
  float value[64];
};

void read_beyond(const float* x, float* y) { simt::store(y + simt::thread_index(), simt::load(x + simt::thread_index() + 1)); }

void write_to_input(const float* x, float*) { simt::store(const_cast<float*>(x) + simt::thread_index(), 1.0f); }

void misaligned(const float* x, float* y) {
  const auto v = simt::load(reinterpret_cast<const simt::Words4*>(x + 1));
  simt::store(y, simt::float_of_bits(v.word[0]));
}

void barrier_for_some(const float*, float*) {
  if (simt::thread_index() < 40) simt::block_barrier();
}

// Each thread takes what its neighbour left, without waiting for it.
void no_barrier(const float* x, float* y) {
  Shared& shared = simt::shared_memory<Shared>();
  const int t = simt::thread_index();
  shared.value[t] = simt::load(x + t);
  simt::store(y + t, shared.value[(t + 1) % 64]);
}

void with_barrier(const float* x, float* y) {
  Shared& shared = simt::shared_memory<Shared>();
  const int t = simt::thread_index();
  shared.value[t] = simt::load(x + t);
  simt::block_barrier();
  simt::store(y + t, shared.value[(t + 1) % 64]);
}

void (*const kKernels[])(const float*, float*) = {read_beyond, write_to_input, misaligned, barrier_for_some, no_barrier, with_barrier};

}  // namespace

extern "C" {

// Runs a kernel on x (64,) and y (64,) with 64 threads; what was wrong, or nothing.
const char* simt_fault(int kernel, std::uint64_t seed, const float* x, float* y) {
  machine.regions.clear();
  machine.error.clear();
  machine.seed = seed;
  for (const void* p : {static_cast<const void*>(x), static_cast<const void*>(y)}) {
    const auto begin = reinterpret_cast<std::uintptr_t>(p);
    machine.regions.push_back({begin, begin + 64 * sizeof(float), p == y});
  }
  simt::launch(simt::Grid{1, 64, sizeof(Shared), nullptr}, "fault", kKernels[kernel], x, y);
  return machine.error.c_str();
}

const char* simt_error() { return machine.error.c_str(); }
void simt_begin(std::uint64_t) {}
void simt_region(const void*, std::int64_t, int) {}

}  // extern "C"
