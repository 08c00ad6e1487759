// Maximum, log-sum-exp and target log-probabilities of each row, in one read of the logits.
#include "cuda/row_forward.cuh"

#include "cuda/row_launch.h"

namespace cpo {
namespace {

// Grid: a block per row.
template <class T, class Head>
CPO_KERNEL(Head::kThreads, Head::kBlocks) row_forward_kernel(ForwardArgs args, Head head) {
  forward_row<T>(args, head, simt::block_index(), simt::shared_memory<Partials>());
}

}  // namespace

void row_forward(const Queue& queue, DType dtype, const ForwardArgs& args) {
  const RowBatch& batch = args.batch;
  if (batch.rows == 0) return;
  const DeviceGuard guard(queue.device);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_head(batch.bias, batch.mult, batch.cap, [&](auto head) {
      using H = decltype(head);
      const simt::Grid grid{batch.rows, row_threads<T, H>(queue, batch.vocab), sizeof(Partials), queue.stream};
      simt::launch(grid, "row_forward", row_forward_kernel<T, H>, args, head);
    });
  });
}

}  // namespace cpo
