// C = A @ B (+ C) with fp32 accumulators, out of fp32, bf16 or fp16 matrices.
//
// Every element of C is the sum, in ascending order of k, of one chain of multiply-adds per block of k. The blocks
// depend on k and the dtypes alone, so the result is bitwise the same for any number of threads.
#pragma once

#include "cpu/gemm_args.h"
#include "cpu/isa.h"

namespace cpo {

// The kernel for inputs of these dtypes, or null where this instruction set has none.
const GemmKernel* gemm_kernel(Isa isa, DType a, DType b);

// Whether the machine multiplies bf16 tiles in hardware (AMX), several times faster than any kernel here.
bool machine_has_amx_bf16();

}  // namespace cpo
