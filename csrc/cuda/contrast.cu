// Segment sums, the ranked contrast and the coefficients of all groups of a chunk in one launch.
#include "cuda/contrast.cuh"

#include "cuda/device_guard.h"

namespace cpo {
namespace {

constexpr int kContrastThreads = 256;

// Grid: a block per group.
CPO_KERNEL(kContrastThreads, 2) contrast_kernel(ContrastArgs args) {
  const Candidates shared(&simt::shared_memory<double>(), args.max_candidates);
  contrast_group(args, simt::block_index(), shared);
}

// Without more warps than a group has candidates, where they are few.
int contrast_threads(const Queue& queue, int max_candidates) {
  if (queue.threads != 0) return checked_threads(queue.threads, kContrastThreads);
  int threads = kWarpSize;
  while (threads < kContrastThreads && threads / kWarpSize < max_candidates) threads *= 2;
  return threads;
}

}  // namespace

void contrast(const Queue& queue, const ContrastArgs& args) {
  if (args.groups == 0) return;
  const DeviceGuard guard(queue.device);
  const int threads = contrast_threads(queue, args.max_candidates);
  const simt::Grid grid{args.groups, threads, contrast_shared_bytes(args.max_candidates), queue.stream};
  simt::launch(grid, "contrast", contrast_kernel, args);
}

}  // namespace cpo
