// The row kernels over all rows, on an instruction set and a number of threads.
#pragma once

#include <functional>

#include "cpu/isa.h"
#include "cpu/row_args.h"

namespace cpo {

// Both check the tokens first and throw std::invalid_argument before anything is written. Rows do not depend on one another,
// so the results are bitwise the same for any number of threads.
void row_forward(Isa isa, DType dtype, const ForwardArgs& args, int threads);

// Fills args.token_grad and coef_sum itself; both are workspace of the caller. out_dtype is dtype, or a half-precision type where
// dtype is kF32; anything else is an std::invalid_argument as well.
void row_backward(Isa isa, DType dtype, DType out_dtype, const BackwardArgs& args, float* coef_sum, int threads);

// Each column is summed by one thread, in the order of the rows.
void column_stats(Isa isa, DType dtype, const ColumnArgs& args, int threads);

// Calls work(begin, end) for shares of the rows, each once.
void for_row_shares(const RowBatch& batch, int threads, const std::function<void(std::int64_t, std::int64_t)>& work);

// Throws std::invalid_argument for a row or a column that there is not, before anything is written.
void take_columns(Isa isa, DType dtype, const TakeArgs& args, int threads);

}  // namespace cpo
