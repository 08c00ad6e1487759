// The softmax of the rows of a product, without the logits that it is of.
#pragma once

#include "cpu/gemm.h"

namespace cpo {

// C = A @ B becomes what SoftmaxArgs says. `sample` is memory for R x kSampleColumns floats from which references are chosen, and
// null where they are given. Returns the number of rows that need another reference: one near their maximum.
// Throws std::invalid_argument for wrong tokens before anything is written.
std::int64_t softmax_of_product(const GemmKernel& kernel, const GemmArgs& args, const SoftmaxResult& result, float* sample, void* workspace);

// Fills args.scale, and coef_sum and token_coef, which are memory of the caller.
void scale_softmax(const GemmKernel& kernel, DType dtype, const ScaleArgs& args, const float* coef, float* coef_sum, float* token_coef,
                   int threads);

}  // namespace cpo
