// What crosses the border between baseline code and the softmax of a product's rows, compiled per instruction set.
#pragma once

#include <cstdint>

#include "cpu/row_args.h"

namespace cpo {

constexpr std::int64_t kSumColumns = 48;     // of one partial sum, a multiple of every tile's columns
constexpr std::int64_t kSampleColumns = 64;  // from which references are chosen

inline std::int64_t sums_per_row(std::int64_t vocab) { return (vocab + kSumColumns - 1) / kSumColumns; }

// The softmax of R rows of logits that a product makes: they are never stored. `batch.logits` is null, or where e^(y - reference)
// * dy/dx / slope goes in their place, in the dtype of the product's result. The sums of e^(y - reference) are partial, over
// kSumColumns columns each, so that their order does not depend on who adds them.
struct SoftmaxArgs {
  RowBatch batch;
  LogitTransform transform;
  float* reference;  // (R,): one of the row's y
  float* sums;       // (R, sums_per_row(V))
  float* y;          // (N,): at each token's target
};

// What the rows are once all sums are there.
struct SoftmaxResult {
  void* out;  // as batch.logits; the target's column becomes the gradient's, (e^(y - reference) - sum) * dy/dx / slope
  std::int64_t out_stride;
  float* logsum;  // (R,): log sum_j exp(y_j - reference)
  float* logps;   // (N,)
};

// What each row of `out` is to be multiplied by once the coefficients are there.
struct ScaleArgs {
  RowBatch batch;
  LogitTransform transform;
  const float* reference;   // (R,)
  const float* logsum;      // (R,)
  const float* logps;       // (N,)
  const float* coef_sum;    // (R,)
  const float* token_coef;  // (N,): the summed coefs of the row's tokens with this target
  void* out;
  std::int64_t out_stride;
  float* scale;             // (R,)
  bool in_place;            // multiply all rows of `out` here, so that each scale is 1
};

// One instruction set's functions for the rows [begin, end). Those of a type that results are not kept in are null.
struct SoftmaxKernels {
  // Chooses references: the largest y in a sample (R, kSampleColumns) of the logits and of the bias, or null.
  void (*choose)(const SoftmaxArgs&, const float* sample, const float* sample_bias, std::int64_t begin, std::int64_t end);
  // Returns the number of rows whose reference was so far from their maximum that their sum says nothing.
  std::int64_t (*finish[kNumDTypes])(const SoftmaxArgs&, const SoftmaxResult&, std::int64_t begin, std::int64_t end);
  void (*scale[kNumDTypes])(const ScaleArgs&, std::int64_t begin, std::int64_t end);
};

}  // namespace cpo
