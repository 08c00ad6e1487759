// What the gradient needs of the logits, kept in 16 bits: exp(y - top) * dy/dx / slope, top being the row's maximum in the tile.
//
// A logit of 16 bits would be off by more than 1 at 400; the exponential has a relative error of a rounding, like the gradient that
// is made of it by one factor per row and tile. The maxima are kept beside it in float32.
#pragma once

#include "cuda/launch.h"
#include "cuda/linear_epilogue.cuh"

namespace cpo::linear {

struct Kept {
  void* exponentials;   // (R, V) of the dtype of the inputs, rows rounded up to vectors
  std::int64_t stride;  // elements from row to row
  float* tile_tops;     // (vocabulary tiles, R)
  float* slopes;        // (N,): dy/dx at the targets, in units of its value at y = 0
};

// Word i of lane l becomes word l of lane i.
CPO_DEVICE void transpose_quad(std::uint32_t (&word)[4], int quad_lane) {
  CPO_UNROLL
  for (int mask = 1; mask <= 2; mask *= 2) {
    const bool upper = (quad_lane & mask) != 0;
    CPO_UNROLL
    for (int i = 0; i < 4; ++i) {
      if ((i & mask) != 0) continue;
      const std::uint32_t other = simt::shuffle_xor(upper ? word[i] : word[i + mask], mask);
      (upper ? word[i] : word[i + mask]) = other;
    }
  }
}

CPO_DEVICE float quad_max(float x) {
  x = fmaxf(x, simt::shuffle_xor(x, 1));
  return fmaxf(x, simt::shuffle_xor(x, 2));
}

template <int kRow>
CPO_DEVICE float max_of_columns(const float (&y)[kAccumulators]) {
  float top = -INFINITY;
  CPO_UNROLL
  for (int i = 2 * kRow; i < kAccumulators; i += 4) top = fmaxf(top, fmaxf(y[i], y[i + 1]));
  return top;
}

// Adds the columns, uncapped, to the row's sum as add_columns does, and keeps them: of the pairs of columns that 4 threads have,
// each makes a vector of 8. A softcap is monotonic, so the maximum may come before it.
template <int kRow, class T, class Head>
CPO_DEVICE void keep_columns(OnlineSum& sum, const float (&u)[kAccumulators], const Head& head, const Kept& kept, std::int64_t row,
                             std::int64_t rows, int quad_lane, int tile, int vocab) {
  // Of the columns from this thread's first vector on, every fourth vector is this thread's.
  const int first_column = tile * kTileColumns + 8 * quad_lane;
  T* const at = static_cast<T*>(kept.exponentials) + row * kept.stride + first_column;
  const int inside = row < rows ? vocab - first_column : 0;
  const float top = capped(head, quad_max(max_of_columns<kRow>(u))), centre = finite_centre(top);
  float even = 0.0f, odd = 0.0f;
  CPO_UNROLL
  for (int first = 2 * kRow; first < kAccumulators; first += 16) {
    simt::Words4 v;
    CPO_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float a = u[first + 4 * i], b = u[first + 4 * i + 1];
      const float exp_a = exp_approx(capped(head, a) - centre), exp_b = exp_approx(capped(head, b) - centre);
      even += exp_a;
      odd += exp_b;
      v.word[i] = pack2(exp_a * slope_of(head, a), exp_b * slope_of(head, b), T{});
    }
    transpose_quad(v.word, quad_lane);
    const int column = first / 4 * 8;
    if (column < inside) simt::store(reinterpret_cast<simt::Words4*>(at + column), v);
  }
  if (row < rows && quad_lane == 0) simt::store(kept.tile_tops + tile * rows + row, top);
  sum = merge(sum, {top, even + odd});
}

}  // namespace cpo::linear
