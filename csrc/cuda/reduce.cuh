// Reductions over the threads of a warp and of a block, in a fixed order; every thread gets the same bits.
#pragma once

#include "cuda/simt.h"

namespace cpo {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;

CPO_DEVICE int lane_index() { return simt::thread_index() % kWarpSize; }
CPO_DEVICE int warp_index() { return simt::thread_index() / kWarpSize; }
CPO_DEVICE int warp_count() { return simt::thread_count() / kWarpSize; }

struct Add {
  template <class T>
  CPO_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

// Of NaN and a number, the number.
struct Max {
  CPO_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
  CPO_DEVICE double operator()(double a, double b) const { return fmax(a, b); }
  CPO_DEVICE std::int64_t operator()(std::int64_t a, std::int64_t b) const { return a < b ? b : a; }
};

// `op` commutes, and so the lanes of a butterfly agree to the last bit.
template <class T, class Op>
CPO_DEVICE T warp_reduce(T value, Op op) {
  CPO_UNROLL
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = op(value, simt::shuffle_xor(value, mask));
  return value;
}

// What the warps of a block leave for each other.
struct Partials {
  float value[kMaxWarps];
};

template <class Op>
CPO_DEVICE float block_reduce(float value, float identity, Partials& partials, Op op) {
  value = warp_reduce(value, op);
  simt::block_barrier();  // the partials of the reduction before this one have been read
  if (lane_index() == 0) partials.value[warp_index()] = value;
  simt::block_barrier();
  value = lane_index() < warp_count() ? partials.value[lane_index()] : identity;
  return warp_reduce(value, op);
}

}  // namespace cpo
