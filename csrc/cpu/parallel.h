// Loops over threads that belong to torch. The extension links no OpenMP runtime of its own: a second one in the process would
// be a second set of threads, which spins while torch's work. It is given the entry points of the one that torch has loaded.
//
// Files compiled for an instruction set include this, so that nothing here is inline.
#pragma once

#include <cstdint>

namespace cpo {

// Functions of an OpenMP runtime by the names they have in GCC's; LLVM's and Intel's have them too.
struct OpenMp {
  void (*GOMP_parallel)(void (*member)(void*), void* data, unsigned num_threads, unsigned flags);
  int (*omp_get_thread_num)();
  int (*omp_get_num_threads)();
};

// Before this is called, and in a process without a runtime, loops have one thread.
void use_openmp(const OpenMp& runtime);

// task(context, i) for every i in [0, count), by at most `threads` threads, each of which begins with the index of its own
// number and then takes the next that nobody has taken: equal shares stay with their threads, unequal ones balance.
void parallel_for(std::int64_t count, int threads, void (*task)(const void* context, std::int64_t i), const void* context);

}  // namespace cpo
