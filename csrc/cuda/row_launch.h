// What the launchers of row kernels share: how many threads take a row, and types from codes.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/device_guard.h"
#include "cuda/launch.h"
#include "cuda/row_forward.cuh"
#include "cuda/simt.h"

namespace cpo {

// Enough that a short row leaves no thread without a vector, within what the kernels are compiled for.
template <class T, class Head>
int row_threads(const Queue& queue, int vocab) {
  if (queue.threads != 0) {
    if (queue.threads < kWarpSize || queue.threads > Head::kThreads || queue.threads % kWarpSize != 0) {
      throw std::invalid_argument("threads is " + std::to_string(queue.threads) + "; expected a multiple of 32 up to " +
                                  std::to_string(Head::kThreads));
    }
    return queue.threads;
  }
  const std::size_t vectors = static_cast<std::size_t>(vocab) * sizeof(T) / kVectorBytes;
  int threads = Head::kThreads;
  while (threads > 4 * kWarpSize && static_cast<std::size_t>(threads) * kLoadsInFlight > vectors) threads /= 2;
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
