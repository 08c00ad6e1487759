// Targets that no word has stop what follows, and the first that a warp finds is named: the host looks at none.
#include "cuda/device_guard.h"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"

namespace cpo {
namespace {

constexpr int kCheckThreads = 256;
constexpr std::int64_t kCheckBlocks = 64;

// Grid: any number of blocks.
CPO_KERNEL(kCheckThreads, 4) check_targets_kernel(TargetArgs args) {
  const std::int64_t step = simt::block_count() * simt::thread_count();
  std::int64_t bad = args.count;
  for (std::int64_t n = simt::block_index() * simt::thread_count() + simt::thread_index(); n < args.count && bad == args.count; n += step) {
    const std::int64_t target = simt::load(args.targets + n);
    if (target != kNoToken && (target < 0 || target >= args.vocab)) bad = n;
  }
  const std::int64_t first = -warp_reduce(-bad, Max());
  if (bad == first && first < args.count) simt::stop_at_target(first, simt::load(args.targets + first), args.vocab);
}

}  // namespace

void check_targets(const Queue& queue, const TargetArgs& args) {
  if (args.count == 0) return;
  const DeviceGuard guard(queue.device);
  const std::int64_t blocks = (args.count + kCheckThreads - 1) / kCheckThreads;
  const simt::Grid grid{blocks < kCheckBlocks ? blocks : kCheckBlocks, kCheckThreads, 0, queue.stream};
  simt::launch(grid, "check_targets", check_targets_kernel, args);
}

}  // namespace cpo
