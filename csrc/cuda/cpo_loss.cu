// The whole objective of logits that exist, in one cooperative launch: log-softmax of every row, contrast of every group, gradient.
//
// A coefficient needs the log-probabilities of its whole group, and so the grid waits twice. With the gradient the logits are read
// twice and it is written once; of the second read, what the L2 cache holds of the last rows costs no bandwidth.
#include "cuda/contrast.cuh"
#include "cuda/row_backward.cuh"
#include "cuda/row_launch.h"

namespace cpo {
namespace {

// Grid: as many blocks as run at a time, each taking every so manieth row and group.
template <class T, class Head>
CPO_KERNEL(Head::kThreads, Head::kBlocks) cpo_loss_kernel(LossArgs args, Head head) {
  const RowBatch& batch = args.forward.batch;
  const std::int64_t first = simt::block_index(), step = simt::block_count();
  Partials& partials = simt::shared_memory<Partials>();
  for (std::int64_t row = first; row < batch.rows; row += step) forward_row<T>(args.forward, head, row, partials);
  simt::grid_barrier();

  const Candidates candidates(&simt::shared_memory<double>(), args.contrast.max_candidates);
  for (std::int64_t group = first; group < args.contrast.groups; group += step) {
    contrast_group(args.contrast, group, candidates);
    simt::block_barrier();  // the candidates of this group have been read
  }
  if (!args.grad) return;
  simt::grid_barrier();

  const BackwardArgs backward{batch, args.forward.stats, args.contrast.coef, nullptr, args.grad, args.grad_stride, nullptr};
  for (std::int64_t row = batch.rows - 1 - first; row >= 0; row -= step) backward_row<T, T>(backward, head, row, partials);
}

}  // namespace

void cpo_loss(const Queue& queue, DType dtype, const LossArgs& args) {
  const RowBatch& batch = args.forward.batch;
  if (args.contrast.groups == 0) return;
  if (batch.row_starts) throw std::invalid_argument("cpo_loss takes one token a row");
  const DeviceGuard guard(queue.device);
  const std::size_t shared_bytes = contrast_shared_bytes(args.contrast.max_candidates);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_head(batch.bias, batch.mult, batch.cap, [&](auto head) {
      using H = decltype(head);
      const int threads = row_threads<T, H>(queue, batch.vocab);
      const std::int64_t blocks = batch.rows > args.contrast.groups ? batch.rows : args.contrast.groups;
      const simt::Grid grid{blocks, threads, shared_bytes < sizeof(Partials) ? sizeof(Partials) : shared_bytes, queue.stream};
      simt::launch_cooperative(grid, queue.device, "cpo_loss", cpo_loss_kernel<T, H>, args, head);
    });
  });
}

}  // namespace cpo
