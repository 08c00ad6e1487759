// A finished gradient times an upstream gradient that lies on the device: where that is 1, nothing else is read.
#include "cuda/row_launch.h"
#include "cuda/vectors.cuh"

namespace cpo {
namespace {

constexpr int kScaleThreads = 256;
constexpr std::int64_t kScaleBlocks = 1024;  // as many as run at a time on the largest GPUs, or about

// Grid: any number of blocks.
template <class T>
CPO_KERNEL(kScaleThreads, 4) scale_kernel(ScaleArgs args) {
  const float factor = simt::load(args.factor);
  if (factor == 1.0f) return;
  constexpr int K = kVectorSize<T>;
  T* x = static_cast<T*>(args.numbers);
  const std::int64_t vectors = args.count / K, tile = kLoadsInFlight * simt::thread_count();
  for (std::int64_t first = simt::block_index() * tile + simt::thread_index(); first < vectors; first += simt::block_count() * tile) {
    simt::Words4 v[kLoadsInFlight] = {};
    CPO_UNROLL
    for (int u = 0; u < kLoadsInFlight; ++u) {
      const std::int64_t i = first + u * simt::thread_count();
      if (i < vectors) v[u] = simt::load(reinterpret_cast<const simt::Words4*>(x) + i);
    }
    CPO_UNROLL
    for (int u = 0; u < kLoadsInFlight; ++u) {
      const std::int64_t i = first + u * simt::thread_count();
      if (i >= vectors) continue;
      float y[K];
      unpack(v[u], y, T{});
      CPO_UNROLL
      for (int k = 0; k < K; ++k) y[k] *= factor;
      store_vector(x + i * K, y);
    }
  }
  const std::int64_t rest = vectors * K + simt::thread_index();
  if (simt::block_index() == 0 && rest < args.count) store_rounded(x + rest, to_float(simt::load(x + rest)) * factor);
}

}  // namespace

void scale(const Queue& queue, DType dtype, const ScaleArgs& args) {
  if (args.count == 0) return;
  const DeviceGuard guard(queue.device);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const std::int64_t tile = std::int64_t{kLoadsInFlight} * kScaleThreads * kVectorSize<T>;
    const std::int64_t blocks = (args.count + tile - 1) / tile;
    const simt::Grid grid{blocks < kScaleBlocks ? blocks : kScaleBlocks, kScaleThreads, 0, queue.stream};
    simt::launch(grid, "scale", scale_kernel<T>, args);
  });
}

}  // namespace cpo
