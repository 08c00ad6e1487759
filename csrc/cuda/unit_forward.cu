// Forward and unit gradient of each row in one launch, one read and one write.
#include "cuda/unit_forward.cuh"

#include "cuda/row_launch.h"

namespace cpo {
namespace {

// Of a row in one block, so that two blocks share a multiprocessor: one computes while the other waits for memory.
constexpr std::int64_t kSliceBytes = 96 * 1024;

// Grid: a cluster per row.
template <class T, class Out, class Head>
CPO_KERNEL(Head::kThreads, Head::kBlocks) unit_forward_kernel(UnitArgs args, Head head) {
  unit_row<T, Out>(args, head);
}

struct ClusterShape {
  int blocks;
  std::size_t shared_bytes;  // of a block
};

// The smallest cluster whose blocks hold a row with slices of so many bytes; the largest, where it holds the row at all.
ClusterShape cluster_shape(std::int64_t row_bytes, std::int64_t slice_bytes, const simt::ClusterLimits& limits) {
  const std::int64_t vectors = row_bytes / kVectorBytes;
  for (int blocks = 1; blocks <= limits.blocks; blocks *= 2) {
    const std::int64_t slice = (vectors + blocks - 1) / blocks * kVectorBytes;
    const std::size_t shared = sizeof(SliceHeader) + static_cast<std::size_t>(slice);
    if (slice <= slice_bytes || (blocks == limits.blocks && shared <= limits.shared_bytes)) return {blocks, shared};
  }
  throw std::invalid_argument("a row of " + std::to_string(row_bytes) + " bytes; expected what the shared memory of " +
                              std::to_string(limits.blocks) + " blocks holds, " + std::to_string(limits.shared_bytes) + " bytes each");
}

template <class T, class Out>
void launch_unit(const Queue& queue, const UnitArgs& args) {
  const RowBatch& batch = args.forward.batch;
  const auto row_bytes = static_cast<std::int64_t>(batch.vocab) * static_cast<std::int64_t>(sizeof(T));
  const std::int64_t slice_bytes = args.slice_bytes ? args.slice_bytes : kSliceBytes;
  with_head(batch.bias, batch.mult, batch.cap, [&](auto head) {
    using H = decltype(head);
    const auto kernel = unit_forward_kernel<T, Out, H>;
    const simt::ClusterLimits limits = simt::cluster_limits(queue.device, kernel);
    const ClusterShape shape = cluster_shape(row_bytes, slice_bytes, limits);
    // Shared memory limits the blocks of a multiprocessor, not their threads.
    const int threads = row_threads<T, H>(queue, batch.vocab / shape.blocks, 1);
    const simt::Grid grid{batch.rows * shape.blocks, threads, shape.shared_bytes, queue.stream};
    simt::launch_cluster(grid, shape.blocks, limits, "unit_forward", kernel, args, head);
  });
}

}  // namespace

std::int64_t unit_forward_bytes(int device) {
  const DeviceGuard guard(device);
  const simt::ClusterLimits limits = simt::cluster_limits(device, unit_forward_kernel<float, float, Head<false, false, false>>);
  const auto vectors = static_cast<std::int64_t>((limits.shared_bytes - sizeof(SliceHeader)) / kVectorBytes);
  return limits.blocks * vectors * kVectorBytes;
}

void unit_forward(const Queue& queue, DType dtype, DType out_dtype, const UnitArgs& args) {
  if (args.forward.batch.rows == 0) return;
  if (dtype != DType::kF32 && out_dtype != dtype) {
    throw std::invalid_argument("the gradient of half-precision logits has their dtype");
  }
  const DeviceGuard guard(queue.device);
  with_type(out_dtype, [&](auto out) {
    using Out = decltype(out);
    if (dtype == DType::kF32) {
      launch_unit<float, Out>(queue, args);
    } else {
      launch_unit<Out, Out>(queue, args);
    }
  });
}

}  // namespace cpo
