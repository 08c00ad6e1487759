// What a thread does with its accumulators: the head's transform, the logits of the rows' targets, a running max and sum.
//
// A thread holds 2 rows of a tile, and of each the 64 columns 8 j + 2 lane + b, lane being its place among the 4 threads (quad)
// that share the rows: y[4 j + 2 h + b] of row h.
#pragma once

#include "cuda/head.cuh"
#include "cuda/linear_schedule.h"

namespace cpo::linear {

constexpr int kAccumulators = kTileColumns / 2;

// A logit before its softcap, which bounds -inf too: that is left for columns that do not exist.
template <bool kBias, bool kScaled, bool kCapped>
CPO_DEVICE float uncapped(const Head<kBias, kScaled, kCapped>& head, float x, float bias) {
  const float u = head.scaled(x, bias);
  return kCapped && u == -INFINITY ? kLowest : u;
}

// A softcap alone, without the loads of a bias between its elements, spills registers unless each element has its branch.
template <bool kBias, bool kScaled, bool kCapped>
CPO_DEVICE float softcap(const Head<kBias, kScaled, kCapped>& head, float u) {
  return head.cap * (kBias ? tanh_approx(u) : tanh_by_branch(u));
}

template <bool kBias, bool kScaled, bool kCapped>
CPO_DEVICE float capped(const Head<kBias, kScaled, kCapped>& head, float u) {
  return kCapped && u != -INFINITY ? softcap(head, u) : u;
}

// As Head::logit.
template <bool kBias, bool kScaled, bool kCapped>
CPO_DEVICE float logit_of(const Head<kBias, kScaled, kCapped>& head, float x, float bias) {
  const float u = head.scaled(x, bias);
  return kCapped ? softcap(head, u) : u;
}

// dy/dx in units of its value at y = 0.
template <bool kBias, bool kScaled, bool kCapped>
CPO_DEVICE float slope_of(const Head<kBias, kScaled, kCapped>&, float u) {
  return kCapped ? tanh_slope(u) : 1.0f;
}

// Raw logits to logits of the softmax, in place; -inf from column `vocab` on. With kUncapped, to what a softcap is yet to be put on.
template <bool kUncapped, class Head>
CPO_DEVICE void transform_tile(float (&y)[kAccumulators], const Head& head, int quad_lane, int first_column, int vocab) {
  const int first = first_column + 2 * quad_lane, inside = vocab - first;  // of the columns from this thread's first on
  CPO_UNROLL
  for (int i = 0; i < kAccumulators; i += i % 4 == 0 ? 1 : 3) {  // the first row's two columns of every group of 8
    const int column = 8 * (i / 4) + i % 4;
    const float bias = column < inside ? head.bias_of(first + column) : 0.0f;
    y[i] = kUncapped ? uncapped(head, y[i], bias) : logit_of(head, y[i], bias);
    y[i + 2] = kUncapped ? uncapped(head, y[i + 2], bias) : logit_of(head, y[i + 2], bias);
  }
  if (inside >= kTileColumns) return;
  CPO_UNROLL
  for (int i = 0; i < kAccumulators; ++i) {
    if (8 * (i / 4) + i % 2 >= inside) y[i] = -INFINITY;
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
  int count = 0;
  int first = -1;
};

CPO_DEVICE std::int64_t first_token(const std::int64_t* row_starts, std::int64_t row) {
  return row_starts ? simt::load(row_starts + row) : row;
}

// A target's column, or -1 where the vocabulary has none.
CPO_DEVICE int column_of(std::int64_t target, int vocab) {
  return target >= 0 && target < vocab ? static_cast<int>(target) : -1;
}

CPO_DEVICE RowTokens find_tokens(const std::int64_t* targets, const std::int64_t* row_starts, std::int64_t row, std::int64_t rows,
                                 int vocab) {
  RowTokens tokens;
  if (row >= rows) return tokens;
  const std::int64_t begin = first_token(row_starts, row);
  tokens.count = static_cast<int>((row_starts ? simt::load(row_starts + row + 1) : row + 1) - begin);
  if (tokens.count > 0) tokens.first = column_of(simt::load(targets + begin), vocab);
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

// Where the targets are, and where their logits go; with a gradient to follow, their slopes too.
struct TargetLogits {
  const std::int64_t* targets;     // (N,)
  const std::int64_t* row_starts;  // (R + 1,), or null
  float* logits;                   // (N,)
  float* slopes;                   // (N,), or null
};

// Writes those of a row's targets that lie in this tile, in this thread's columns: each is written once.
template <int kRow, bool kUncapped, class Head>
CPO_DEVICE void store_target_logits(const TargetLogits& out, const RowTokens& tokens, std::int64_t row,
                                    const float (&y)[kAccumulators], const Head& head, int quad_lane, int first_column, int vocab) {
  for (int i = 0; i < tokens.count; ++i) {
    const std::int64_t n = first_token(out.row_starts, row) + i;
    const int known = i == 0 ? tokens.first : column_of(simt::load(out.targets + n), vocab);
    const int column = known - first_column;
    if (known < 0 || column < 0 || column >= kTileColumns || column % 8 / 2 != quad_lane) continue;
    const float picked = pick<kRow>(y, column);
    simt::store(out.logits + n, kUncapped ? capped(head, picked) : picked);
    if (kUncapped) simt::store(out.slopes + n, slope_of(head, picked));
  }
}

}  // namespace cpo::linear
