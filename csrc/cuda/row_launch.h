// What the launchers of row kernels share: how many threads take a row, and types from codes.
#pragma once

#include "cuda/device_guard.h"
#include "cuda/launch.h"
#include "cuda/row_forward.cuh"
#include "cuda/simt.h"

namespace cpo {

// Tiles of kLoadsInFlight vectors a thread that a row has at least: shorter rows take smaller blocks, more of which share a
// multiprocessor, so that what a row waits for at its ends passes beside other rows.
constexpr int kTilesPerRow = 4;

// Threads of a block for a row, or of each block for its `vocab` columns, within what the kernels are compiled for.
template <class T, class Head>
int row_threads(const Queue& queue, int vocab, int tiles = kTilesPerRow) {
  if (queue.threads != 0) return checked_threads(queue.threads, Head::kThreads);
  const std::size_t vectors = static_cast<std::size_t>(vocab) * sizeof(T) / kVectorBytes;
  int threads = Head::kThreads;
  while (threads > 4 * kWarpSize && static_cast<std::size_t>(threads) * kLoadsInFlight * tiles > vectors) threads /= 2;
  return threads;
}

// Calls run(T{}) with the type of a code.
template <class Run>
void with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::kF32: return run(float{});
    case DType::kBF16: return run(bf16{});
    case DType::kF16: return run(f16{});
  }
  throw std::invalid_argument("unknown dtype");
}

}  // namespace cpo
