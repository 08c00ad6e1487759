// Launches the fused linear forward. What it needs of the device is looked up, never waited for.
#include "cuda/linear_sm90.h"

#include "cuda/device_guard.h"
#include "cuda/linear_kernel.cuh"
#include "cuda/tensor_map.h"

namespace cpo {
namespace {

using linear::Schedule;

#if defined(__CUDACC__)
int attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  simt::check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

hopper::Facts find_facts(int device) {
  return {attribute(device, cudaDevAttrComputeCapabilityMajor), attribute(device, cudaDevAttrComputeCapabilityMinor),
          attribute(device, cudaDevAttrMultiProcessorCount), attribute(device, cudaDevAttrL2CacheSize)};
}
#else
hopper::Facts find_facts(int) { return hopper::facts; }
#endif

Schedule schedule_for(int device, std::int64_t rows, std::int64_t vocab, std::int64_t depth) {
  const hopper::Facts facts = find_facts(device);
  if (facts.major != 9 || facts.minor != 0) {
    throw std::runtime_error("the fused linear forward needs compute capability 9.0 (Hopper); device " + std::to_string(device) +
                             " has " + std::to_string(facts.major) + "." + std::to_string(facts.minor));
  }
  // Coordinates of the copy engine are 32-bit, and the last tile may reach beyond the matrix.
  constexpr std::int64_t kMost = 0x7fffffff - 2 * linear::kTileColumns;
  if (rows < 1 || vocab < 1 || depth < 1 || rows > kMost || vocab > kMost || depth > kMost) {
    throw std::invalid_argument("sizes (R, V, H) are (" + std::to_string(rows) + ", " + std::to_string(vocab) + ", " +
                                std::to_string(depth) + "); expected numbers from 1 to " + std::to_string(kMost));
  }
  return linear::make_schedule(rows, vocab, depth * 2, facts.multiprocessors, facts.cache_bytes);
}

template <class T>
void launch_forward(const simt::Grid& grid, const LinearArgs& args, DType dtype, const linear::KernelArgs& kernel_args) {
  const CUtensorMap hidden =
      hopper::make_tensor_map("hidden", dtype, {args.hidden, args.rows, args.depth, args.hidden_stride}, linear::kBoxRows);
  const CUtensorMap weight =
      hopper::make_tensor_map("weight", dtype, {args.weight, args.vocab, args.depth, args.weight_stride}, linear::kBoxRows);
  with_head(args.bias, args.mult, args.cap, [&](auto head) {
    const auto kernel = args.exponentials ? linear::linear_forward_kernel<T, true, decltype(head)>
                                          : linear::linear_forward_kernel<T, false, decltype(head)>;
    hopper::launch_clusters(grid, kernel_args.schedule.cluster, "linear_forward", kernel, hidden, weight, kernel_args, head);
  });
}

}  // namespace

std::int64_t linear_workspace(int device, std::int64_t rows, std::int64_t vocab, std::int64_t depth) {
  return rows == 0 ? 0 : 2 * rows * schedule_for(device, rows, vocab, depth).splits;
}

std::int64_t linear_tiles(std::int64_t vocab) { return linear::ceil_div(vocab, linear::kTileColumns); }

void linear_forward_sm90(const Queue& queue, DType dtype, const LinearArgs& args) {
  if (dtype == DType::kF32) throw std::invalid_argument("the fused linear forward takes bfloat16 or float16, not float32");
  if (args.rows == 0) return;
  const Schedule schedule = schedule_for(queue.device, args.rows, args.vocab, args.depth);
  if (args.workspace_floats < 2 * args.rows * schedule.splits || (!args.row_starts && args.tokens != args.rows)) {
    throw std::invalid_argument("a workspace of " + std::to_string(args.workspace_floats) + " floats for " +
                                std::to_string(args.tokens) + " tokens; expected linear_workspace(), and tokens for the rows");
  }
  const DeviceGuard guard(queue.device);
  float* maxima = args.workspace;
  float* sums = maxima + args.rows * schedule.splits;
  const int vocab = static_cast<int>(args.vocab);
  const simt::Grid grid{std::int64_t{schedule.clusters} * schedule.cluster, linear::kThreads, linear::kSharedBytes, queue.stream};
  const linear::KernelArgs kernel_args{schedule,     args.rows,       vocab,      static_cast<int>(args.depth),
                                       args.targets, args.row_starts, args.logps, maxima,
                                       sums,         {args.exponentials, args.exponentials_stride, args.tile_tops, args.slopes}};
  if (dtype == DType::kBF16) {
    launch_forward<bf16>(grid, args, dtype, kernel_args);
  } else {
    launch_forward<f16>(grid, args, dtype, kernel_args);
  }
  const simt::Grid row_grid{linear::ceil_div(args.rows, linear::kWarpgroup), linear::kWarpgroup, 0, queue.stream};
  const linear::CombineArgs combine{args.rows, vocab,          schedule.splits, args.targets, args.row_starts, maxima,
                                    sums,      args.stats.max, args.stats.log_sum, args.logps};
  simt::launch(row_grid, "combine_splits", linear::combine_splits_kernel, combine);
}

}  // namespace cpo
