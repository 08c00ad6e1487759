// The softmax gradient over what the fused linear forward kept: one factor per row and tile, no exponential per column.
#include "cuda/linear_schedule.h"
#include "cuda/linear_sm90.h"
#include "cuda/row_backward.cuh"
#include "cuda/row_launch.h"

namespace cpo {
namespace {

constexpr int kGradientThreads = 256;
constexpr int kWarpColumns = kWarpSize * 8;
static_assert(kWarpColumns == linear::kTileColumns, "a warp takes a tile: 16 bytes a thread");

// Every column as if no token named it. A warp has kLoadsInFlight tiles under way.
template <class T>
CPO_DEVICE void scale_row(const LinearBackwardArgs& args, T* x, std::int64_t row, float max, float log_sum, float factor) {
  const int vocab = args.batch.vocab;
  const int stride = warp_count() * kWarpColumns;
  for (int first = warp_index() * kWarpColumns + lane_index() * 8; first < vocab; first += kLoadsInFlight * stride) {
    simt::Words4 v[kLoadsInFlight] = {};
    float top[kLoadsInFlight] = {};
    CPO_UNROLL
    for (int k = 0; k < kLoadsInFlight; ++k) {
      const int column = first + k * stride;
      if (column >= vocab) continue;
      v[k] = simt::load(reinterpret_cast<const simt::Words4*>(x + column));
      top[k] = simt::load(args.tile_tops + column / kWarpColumns * args.batch.rows + row);
    }
    CPO_UNROLL
    for (int k = 0; k < kLoadsInFlight; ++k) {
      const int column = first + k * stride;
      if (column >= vocab) continue;
      const float scale = factor * exp_approx(top[k] - max - log_sum);
      float g[8];
      unpack(v[k], g, T{});
      CPO_UNROLL
      for (int i = 0; i < 8; ++i) g[i] *= scale;
      store_vector(x + column, g);
    }
  }
}

// The columns that tokens name, of which the statistics and the log-probability in float32 say all; equal targets, equal bits.
template <class T>
CPO_DEVICE void store_targets(const LinearBackwardArgs& args, T* x, TokenRange tokens) {
  const RowBatch& batch = args.batch;
  for (std::int64_t n = tokens.begin + simt::thread_index(); n < tokens.end; n += simt::thread_count()) {
    const std::int64_t target = simt::load(batch.targets + n);
    if (!is_word(target, batch.vocab)) continue;
    float own = 0.0f, others = 0.0f;
    for (std::int64_t m = tokens.begin; m < tokens.end; ++m) {
      const float c = token_coef(batch.targets, args.coef, m);
      (simt::load(batch.targets + m) == target ? own : others) += c;
    }
    const float p = exp_approx(simt::load(args.logps + n));
    store_rounded(x + target, (own * (1.0f - p) - others * p) * batch.slope * simt::load(args.slopes + n));
  }
}

// Grid: a block per row.
template <class T>
CPO_KERNEL(kGradientThreads, 4) linear_backward_kernel(LinearBackwardArgs args) {
  const RowBatch& batch = args.batch;
  const std::int64_t row = simt::block_count() - 1 - simt::block_index();
  T* x = const_cast<T*>(static_cast<const T*>(batch.logits)) + row * batch.row_stride;
  // Before the coefs, so that their latencies pass together.
  const float max = simt::load(args.stats.max + row), log_sum = simt::load(args.stats.log_sum + row);
  const TokenRange tokens = token_range(batch, row);
  const RowCoef coef = sum_coefs(batch, args.coef, tokens, simt::shared_memory<Partials>());
  if (!coef.active) {
    store_zeros(x, batch.vocab);
    return;
  }
  scale_row(args, x, row, max, log_sum, -coef.sum * batch.slope);
  simt::block_barrier();  // what other threads wrote to these columns comes first
  store_targets(args, x, tokens);
}

}  // namespace

void linear_backward(const Queue& queue, DType dtype, const LinearBackwardArgs& args) {
  if (args.batch.rows == 0) return;
  const DeviceGuard guard(queue.device);
  const simt::Grid grid{args.batch.rows, kGradientThreads, sizeof(Partials), queue.stream};
  if (dtype == DType::kBF16) {
    simt::launch(grid, "linear_backward", linear_backward_kernel<bf16>, args);
  } else {
    simt::launch(grid, "linear_backward", linear_backward_kernel<f16>, args);
  }
}

}  // namespace cpo
