// The gradient of each row of raw logits, rounded once: over the logits, or into a tensor of its own.
#include "cuda/row_backward.cuh"

#include "cuda/row_launch.h"

namespace cpo {
namespace {

// Grid: a block per row, the last rows first: the forward left them in the L2 cache, and the products that follow begin at the first.
template <class T, class Out, class Head>
CPO_KERNEL(Head::kThreads, Head::kBlocks) row_backward_kernel(BackwardArgs args, Head head) {
  const std::int64_t row = simt::block_count() - 1 - simt::block_index();
  backward_row<T, Out>(args, head, row, simt::shared_memory<Partials>());
}

template <class T, class Out>
void launch_backward(const Queue& queue, const BackwardArgs& args) {
  const RowBatch& batch = args.batch;
  with_head(batch.bias, batch.mult, batch.cap, [&](auto head) {
    using H = decltype(head);
    const simt::Grid grid{batch.rows, row_threads<T, H>(queue, batch.vocab), sizeof(Partials), queue.stream};
    simt::launch(grid, "row_backward", row_backward_kernel<T, Out, H>, args, head);
  });
}

}  // namespace

void row_backward(const Queue& queue, DType dtype, DType out_dtype, const BackwardArgs& args) {
  if (args.batch.rows == 0) return;
  if (dtype != DType::kF32 && out_dtype != dtype) {
    throw std::invalid_argument("the gradient of half-precision logits has their dtype");
  }
  const DeviceGuard guard(queue.device);
  with_type(out_dtype, [&](auto out) {
    using Out = decltype(out);
    if (dtype == DType::kF32) {
      launch_backward<float, Out>(queue, args);
    } else {
      launch_backward<Out, Out>(queue, args);
    }
  });
}

}  // namespace cpo
