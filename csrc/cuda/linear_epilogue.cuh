// What a thread does with its accumulators: the head's transform, the logits of the rows' targets, a running max and sum.
//
// A thread holds 2 rows of a tile, and of each the 64 columns 8 j + 2 lane + b, lane being its place among the 4 threads (quad)
// that share the rows: y[4 j + 2 h + b] of row h.
#pragma once

#include "cuda/head.cuh"
#include "cuda/linear_schedule.h"

namespace cpo::linear {

constexpr int kAccumulators = kTileColumns / 2;

// Raw logits to logits of the softmax, in place; -inf from column `vocab` on.
template <class Head>
CPO_DEVICE void transform_tile(float (&y)[kAccumulators], const Head& head, int quad_lane, int first_column, int vocab) {
  const int inside = vocab - first_column;
  CPO_UNROLL
  for (int i = 0; i < kAccumulators; i += i % 4 == 0 ? 1 : 3) {  // the first row's two columns of every group of 8
    const int column = 8 * (i / 4) + 2 * quad_lane + i % 4;
    const float bias = head.bias_of(first_column + (column < inside ? column : inside - 1));
    y[i] = head.logit(y[i], bias);
    y[i + 2] = head.logit(y[i + 2], bias);
  }
  if (inside >= kTileColumns) return;
  CPO_UNROLL
  for (int i = 0; i < kAccumulators; ++i) {
    if (8 * (i / 4) + 2 * quad_lane + i % 2 >= inside) y[i] = -INFINITY;
  }
}

// Sum of exp(y - top) over what was seen of a row. Relative to 0 while nothing but -inf was seen: -inf - -inf is NaN.
struct OnlineSum {
  float top = -INFINITY;
  float mass = 0.0f;
};

CPO_DEVICE float finite_centre(float top) { return top == -INFINITY ? 0.0f : top; }

CPO_DEVICE OnlineSum merge(const OnlineSum& a, const OnlineSum& b) {
  const float top = fmaxf(a.top, b.top), centre = finite_centre(top);
  return {top, exp_approx(a.top - centre) * a.mass + exp_approx(b.top - centre) * b.mass};
}

template <int kRow>
CPO_DEVICE void add_columns(OnlineSum& sum, const float (&y)[kAccumulators]) {
  float top = sum.top;
  CPO_UNROLL
  for (int i = 2 * kRow; i < kAccumulators; i += 4) top = fmaxf(top, fmaxf(y[i], y[i + 1]));
  const float centre = finite_centre(top);
  float even = exp_approx(sum.top - centre) * sum.mass, odd = 0.0f;
  CPO_UNROLL
  for (int i = 2 * kRow; i < kAccumulators; i += 4) {
    even += exp_approx(y[i] - centre);
    odd += exp_approx(y[i + 1] - centre);
  }
  sum = {top, even + odd};
}

// The same for the 4 threads that share a row, in a fixed order.
CPO_DEVICE OnlineSum merge_quad(OnlineSum sum) {
  CPO_UNROLL
  for (int mask = 1; mask <= 2; mask *= 2) {
    sum = merge(sum, {simt::shuffle_xor(sum.top, mask), simt::shuffle_xor(sum.mass, mask)});
  }
  return sum;
}

// The tokens of a row; most rows have one, so its column is kept.
struct RowTokens {
  std::int64_t begin = 0;
  int count = 0;
  int first = -1;
};

// A target's column, or -1 where the vocabulary has none.
CPO_DEVICE int column_of(std::int64_t target, int vocab) {
  return target >= 0 && target < vocab ? static_cast<int>(target) : -1;
}

CPO_DEVICE RowTokens find_tokens(const std::int64_t* targets, const std::int64_t* row_starts, std::int64_t row, std::int64_t rows,
                                 int vocab) {
  RowTokens tokens;
  if (row >= rows) return tokens;
  tokens.begin = row_starts ? simt::load(row_starts + row) : row;
  tokens.count = row_starts ? static_cast<int>(simt::load(row_starts + row + 1) - tokens.begin) : 1;
  if (tokens.count > 0) tokens.first = column_of(simt::load(targets + tokens.begin), vocab);
  return tokens;
}

// The logit of row kRow at a column that is this thread's. An index known at run time would move y out of the registers.
template <int kRow>
CPO_DEVICE float pick(const float (&y)[kAccumulators], int column) {
  const int wanted = column / 8 * 4 + column % 2 + 2 * kRow;
  float picked = 0.0f;
  CPO_UNROLL
  for (int i = 0; i < kAccumulators; ++i) {
    if (i / 2 % 2 == kRow) picked = i == wanted ? y[i] : picked;
  }
  return picked;
}

// Writes the logits of those of a row's targets that lie in this tile, in this thread's columns: each is written once.
template <int kRow>
CPO_DEVICE void store_target_logits(float* target_logits, const std::int64_t* targets, const RowTokens& tokens,
                                    const float (&y)[kAccumulators], int quad_lane, int first_column, int vocab) {
  for (int i = 0; i < tokens.count; ++i) {
    const int known = i == 0 ? tokens.first : column_of(simt::load(targets + tokens.begin + i), vocab);
    const int column = known - first_column;
    if (known < 0 || column < 0 || column >= kTileColumns || column % 8 / 2 != quad_lane) continue;
    simt::store(target_logits + tokens.begin + i, pick<kRow>(y, column));
  }
}

}  // namespace cpo::linear
