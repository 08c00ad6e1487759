#include "cpu/parallel.h"

#include <atomic>

namespace cpo {
namespace {

OpenMp openmp = {};

struct Loop {
  std::int64_t count;
  void (*task)(const void*, std::int64_t);
  const void* context;
  std::atomic<std::int64_t> taken{0};  // indices beyond the first of each thread
};

// What each thread of the team runs. The team may be smaller than was asked for.
void member(void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  const std::int64_t team = openmp.omp_get_num_threads();
  for (std::int64_t i = openmp.omp_get_thread_num(); i < loop.count; i = team + loop.taken.fetch_add(1, std::memory_order_relaxed)) {
    loop.task(loop.context, i);
  }
}

}  // namespace

void use_openmp(const OpenMp& runtime) { openmp = runtime; }

void parallel_for(std::int64_t count, int threads, void (*task)(const void*, std::int64_t), const void* context) {
  if (threads <= 1 || count <= 1 || openmp.GOMP_parallel == nullptr) {
    for (std::int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  Loop loop{count, task, context};
  openmp.GOMP_parallel(member, &loop, static_cast<unsigned>(threads), 0);
}

}  // namespace cpo
