// What crosses the border between baseline code and the files compiled per instruction set: plain structs, no inline code.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace cpo {

constexpr std::int64_t kNoToken = -100;

// R rows of V logits and the N tokens they predict; the tokens of row r are row_starts[r]:row_starts[r + 1].
struct RowBatch {
  const void* logits;              // (R, V), unit column stride
  std::int64_t rows;               // R
  std::int64_t vocab;              // V
  std::int64_t row_stride;         // elements
  const std::int64_t* targets;     // (N,)
  const std::int64_t* row_starts;  // (R + 1,), or null: token r belongs to row r
  std::int64_t tokens;             // N
  const float* bias;               // (V,), or null
};

// y = cap * tanh((x + bias) * mult), or y = (x + bias) * mult where cap is 0;  dy/dx = slope * (1 - tanh^2), or slope.
struct LogitTransform {
  float mult;
  float cap;
  float slope;
};

struct ForwardArgs {
  RowBatch batch;
  LogitTransform transform;
  float* max;     // (R,)
  float* logsum;  // (R,): log sum_j exp(y_j - max)
  float* logps;   // (N,)
};

struct BackwardArgs {
  RowBatch batch;
  LogitTransform transform;
  const float* max;
  const float* logsum;
  const float* coef;        // (N,)
  const float* coef_sum;    // (R,): sum of the row's coefs
  float* token_grad;        // (N,): in, the summed coefs of the row's tokens with this target; out, their gradient
  void* out;                // (R, V) of the logits' dtype, or of a narrower one; may be batch.logits itself
  std::int64_t out_stride;  // elements
};

// Largest absolute value and absolute sum of every column of a gradient (R, V).
struct ColumnArgs {
  const void* grad;         // unit column stride
  std::int64_t rows;        // R
  std::int64_t vocab;       // V
  std::int64_t row_stride;  // elements
  float* largest;           // (V,)
  float* total;             // (V,)
};

// Columns whose statistics stay in the first-level cache while the rows go by.
constexpr std::int64_t kColumnsAtOnce = 2048;

// Some columns of some rows of a gradient (R, V), and the sum of each row's other columns behind them.
struct TakeArgs {
  const void* grad;                 // unit column stride
  std::int64_t rows;                // R
  std::int64_t vocab;               // V
  std::int64_t row_stride;          // elements
  const std::int64_t* row_indices;  // (k,)
  std::int64_t num_rows;            // k
  const std::int64_t* columns;      // (c,)
  std::int64_t count;               // c
  void* out;                        // (k, c + 1), dense
};

// One instruction set's kernels, by the DType of the logits and, for backward, that of the gradient: null where it is neither
// the same nor a narrower one. Each handles the rows [begin, end).
struct RowKernels {
  void (*forward[kNumDTypes])(const ForwardArgs&, std::int64_t begin, std::int64_t end);
  void (*backward[kNumDTypes][kNumDTypes])(const BackwardArgs&, std::int64_t begin, std::int64_t end);
  void (*column_stats[kNumDTypes])(const ColumnArgs&, std::int64_t begin, std::int64_t end);  // columns, at most kColumnsAtOnce
  void (*take_columns[kNumDTypes])(const TakeArgs&, std::int64_t begin, std::int64_t end);    // rows of the result
};

extern const RowKernels kRowKernelsScalar;
#if defined(__x86_64__)
extern const RowKernels kRowKernelsAvx2;
extern const RowKernels kRowKernelsAvx512;
extern const RowKernels kRowKernelsAvx512Bf16;
#elif defined(__aarch64__)
extern const RowKernels kRowKernelsNeon;
#endif

}  // namespace cpo
