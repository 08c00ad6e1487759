// The softmax of a product's rows: a stripe of logits is read in the first-level cache, where the product has just left it.
// For inclusion after simd_*.h and vec_math.h, like row_transform.h.
#pragma once

#include "cpu/softmax_args.h"

namespace {

// y - reference beyond this counts as this, so that exp stays finite; sums beyond e^kHeadroom are not used.
constexpr float kMostExponent = 88.0f, kLargestSum = 0x1.9b823ep+86f;  // e^60

// Some rows and columns of the logits, and the place in the result that is theirs, or null.
struct Stripe {
  const float* logits;
  int64_t stride;
  int64_t row, rows, col, cols;
  void* out;
  int64_t out_stride;
};

template <class P>
struct Exponential {
  const P& p;
  Vec reference;

  // min passes NaN on.
  [[gnu::always_inline]] Vec operator()(const Vec& y) const { return exp(min(set1(kMostExponent), y - reference)); }
};

template <class P>
inline Exponential<P> exponential(const P& p, float reference) {
  return {p, set1(reference)};
}

// The sum of n <= kSumColumns columns.
template <class Out, class P>
[[gnu::always_inline]] inline float softmax_part(const float* x, const float* bias, int64_t n, const Exponential<P>& e, Out* out) {
  Vec total = set1(0.0f);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec y = e.p.apply(load(x + j), bias ? load(bias + j) : set1(0.0f)), power = e(y);
    total = total + power;
    if (out) store(out + j, power * e.p.slope(y));
  }
  if (j < n) {
    float last[kLanes] = {}, last_bias[kLanes] = {}, powers[kLanes];
    Out narrow[kLanes];
    for (int64_t i = 0; i < n - j; ++i) {
      last[i] = x[j + i];
      last_bias[i] = bias ? bias[j + i] : 0.0f;
    }
    const Vec y = e.p.apply(load(last), load(last_bias)), power = e(y);
    store(powers, power);
    store(narrow, power * e.p.slope(y));
    for (int64_t i = n - j; i < kLanes; ++i) powers[i] = 0.0f;
    for (int64_t i = 0; out && i < n - j; ++i) out[j + i] = narrow[i];
    total = total + load(powers);
  }
  return reduce_add(total);
}

template <class Out, class P>
void softmax_rows(const cpo::SoftmaxArgs& args, const Stripe& stripe, const P& p) {
  const cpo::RowBatch& batch = args.batch;
  const float* bias = P::kBias && batch.bias ? batch.bias + stripe.col : nullptr;
  for (int64_t i = 0; i < stripe.rows; ++i) {
    const int64_t row = stripe.row + i;
    const float* x = stripe.logits + i * stripe.stride;
    Out* out = stripe.out ? static_cast<Out*>(stripe.out) + i * stripe.out_stride : nullptr;
    float* sums = args.sums + row * cpo::sums_per_row(batch.vocab) + stripe.col / cpo::kSumColumns;
    const auto e = exponential(p, args.reference[row]);
    int64_t j = 0;
    for (; j + cpo::kSumColumns <= stripe.cols; j += cpo::kSumColumns)
      *sums++ = softmax_part(x + j, bias ? bias + j : nullptr, cpo::kSumColumns, e, out ? out + j : nullptr);
    if (j < stripe.cols) *sums = softmax_part(x + j, bias ? bias + j : nullptr, stripe.cols - j, e, out ? out + j : nullptr);
    const TokenRange tokens = tokens_of(batch, row);
    for (int64_t n = tokens.begin; n < tokens.end; ++n) {
      const int64_t at = batch.targets[n] - stripe.col;
      if (at >= 0 && at < stripe.cols) args.y[n] = first_lane(p.apply(set1(x[at]), set1(bias ? bias[at] : 0.0f)));
    }
  }
}

template <class Out>
void softmax_stripe(const cpo::SoftmaxArgs& args, const Stripe& stripe) {
  with_transform(args.batch, args.transform, [&](const auto& p) { softmax_rows<Out>(args, stripe, p); });
}

inline void softmax_of(const cpo::SoftmaxArgs& args, const Stripe& stripe, cpo::DType out_dtype) {
  if (out_dtype == cpo::DType::kF32)
    softmax_stripe<float>(args, stripe);
  else
    softmax_stripe<bf16>(args, stripe);
}

inline void choose_references(const cpo::SoftmaxArgs& args, const float* sample, const float* bias, int64_t begin, int64_t end) {
  with_transform(args.batch, args.transform, [&](const auto& p) {
    for (int64_t row = begin; row < end; ++row) {
      Vec most = set1(-INFINITY);
      for (int64_t j = 0; j < cpo::kSampleColumns; j += kLanes) {
        const Vec x = load(sample + row * cpo::kSampleColumns + j);
        most = max(p.apply(x, bias ? load(bias + j) : set1(0.0f)), most);
      }
      args.reference[row] = usable(reduce_max(most));
    }
  });
}

// What the tokens of a row have in common: whether any has a target, and whether another one has another.
struct RowTargets {
  int64_t first = cpo::kNoToken;
  bool several = false;

  RowTargets(const cpo::RowBatch& batch, TokenRange tokens) {
    for (int64_t n = tokens.begin; n < tokens.end; ++n) {
      const int64_t target = batch.targets[n];
      if (target == cpo::kNoToken) continue;
      several = several || (first != cpo::kNoToken && first != target);
      if (first == cpo::kNoToken) first = target;
    }
  }
};

// In double, in four sums, whose order is always the same.
inline double sum_parts(const float* parts, int64_t count) {
  double total[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; ++k) total[k] += static_cast<double>(parts[i + k]);
  for (; i < count; ++i) total[0] += static_cast<double>(parts[i]);
  return (total[0] + total[1]) + (total[2] + total[3]);
}

template <class Out>
int64_t finish_rows(const cpo::SoftmaxArgs& args, const cpo::SoftmaxResult& result, int64_t begin, int64_t end) {
  const cpo::RowBatch& batch = args.batch;
  const int64_t count = cpo::sums_per_row(batch.vocab);
  int64_t far = 0;
  with_transform(batch, args.transform, [&](const auto& p) {
    for (int64_t row = begin; row < end; ++row) {
      const double total = sum_parts(args.sums + row * count, count), logsum = ::log(total);
      const float reference = args.reference[row];
      const TokenRange tokens = tokens_of(batch, row);
      const RowTargets targets(batch, tokens);
      far += targets.first != cpo::kNoToken && total > static_cast<double>(kLargestSum);
      result.logsum[row] = static_cast<float>(logsum);
      for (int64_t n = tokens.begin; n < tokens.end; ++n)
        result.logps[n] = batch.targets[n] == cpo::kNoToken ? 0.0f : static_cast<float>(static_cast<double>(args.y[n] - reference) - logsum);
      if (!result.out) continue;
      Out* out = static_cast<Out*>(result.out) + row * result.out_stride;
      if (targets.first == cpo::kNoToken) {
        zero_row(out, batch.vocab);
      } else if (!targets.several) {
        int64_t n = tokens.begin;
        while (batch.targets[n] == cpo::kNoToken) ++n;
        const Vec y = set1(args.y[n]);
        const auto e = exponential(p, reference);
        store_column(out + targets.first, first_lane((e(y) - set1(static_cast<float>(total))) * p.slope(y)));
      }
    }
  });
  return far;
}

template <class Out>
void scale_row(Out* out, int64_t vocab, float factor) {
  const Vec by = set1(factor);
  Vec a, b;
  int64_t j = 0;
  for (; j + kPair <= vocab; j += kPair) {
    load2(out + j, a, b);
    store2(out + j, a * by, b * by);
  }
  for (; j < vocab; ++j) {
    const Tail<Out> one_column(out + j, nullptr, 1);
    load2(one_column.x, a, b);
    store_column(out + j, first_lane(a * by));
  }
}

// Rows whose tokens all have one target are multiplied by the products that read them, unless in_place; the others are made here.
template <class Out>
void scale_rows(const cpo::ScaleArgs& args, int64_t begin, int64_t end) {
  const cpo::RowBatch& batch = args.batch;
  with_transform(batch, args.transform, [&](const auto& p) {
    for (int64_t row = begin; row < end; ++row) {
      const TokenRange tokens = tokens_of(batch, row);
      Out* out = static_cast<Out*>(args.out) + row * args.out_stride;
      const double slope = static_cast<double>(p.slope0), logsum = static_cast<double>(args.logsum[row]);
      const float factor = static_cast<float>(-static_cast<double>(args.coef_sum[row]) * slope * ::exp(-logsum));
      bool active = false;
      for (int64_t n = tokens.begin; n < tokens.end; ++n)
        active = active || (batch.targets[n] != cpo::kNoToken && args.token_coef[n] != 0.0f);
      args.scale[row] = active ? factor : 0.0f;
      const RowTargets targets(batch, tokens);
      if (!active && targets.first != cpo::kNoToken && !(::fabs(logsum) < INFINITY)) zero_row(out, batch.vocab);  // 0 * NaN is NaN
      if (!targets.several && !args.in_place) continue;
      scale_row(out, batch.vocab, args.scale[row]);
      args.scale[row] = 1.0f;
      if (!targets.several || !active) continue;
      const auto e = exponential(p, args.reference[row]);
      for (int64_t n = tokens.begin; n < tokens.end; ++n) {
        if (batch.targets[n] == cpo::kNoToken) continue;
        const Vec y = set1(static_cast<float>(static_cast<double>(args.logps[n]) + logsum + static_cast<double>(args.reference[row])));
        const Vec own = set1(static_cast<float>(static_cast<double>(args.token_coef[n]) * slope)) + e(y) * set1(factor);
        store_column(out + batch.targets[n], first_lane(own * p.slope(y)));
      }
    }
  });
}

constexpr cpo::SoftmaxKernels kSoftmaxKernels = {
    choose_references,
    {finish_rows<float>, finish_rows<bf16>, nullptr},
    {scale_rows<float>, scale_rows<bf16>, nullptr},
};

}  // namespace
