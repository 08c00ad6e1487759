// Checks and sums over the N tokens, before any row is touched. Baseline code, shared by all instruction sets.
#pragma once

#include "cpu/row_args.h"

namespace cpo {

// Throws std::invalid_argument, naming the token, for a target outside [0, V) other than -100 and for row_starts that do not
// go from 0 to N without falling.
void check_tokens(const RowBatch& batch);

// coef_sum (R,): the sum of each row's coefs.  token_coef (N,): for each token the sum of the coefs of all tokens of its row
// that have the same target. Tokens with target -100 are left out; sums run in token order, in double, and are rounded to float32 once.
void sum_coefs(const RowBatch& batch, const float* coef, float* coef_sum, float* token_coef);

}  // namespace cpo
