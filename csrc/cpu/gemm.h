// C = A @ B (+ C) with fp32 accumulators, out of fp32, bf16 or fp16 matrices.
//
// Every element of C is the sum, in ascending order of k, of one chain of multiply-adds per block of k. The blocks
// depend on k and the dtypes alone, so the result is bitwise the same for any number of threads.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace cpo {

// Strides count elements and may be anything, 0 included.
struct GemmOperand {
  const void* data;
  DType dtype;
  std::int64_t row_stride;
  std::int64_t col_stride;
};

struct GemmArgs {
  std::int64_t m, n, k;
  GemmOperand a;            // (m, k)
  GemmOperand b;            // (k, n)
  void* out;                // (m, n), unit column stride, sharing no memory with a or b
  DType out_dtype;          // fp32 or bf16
  std::int64_t out_stride;  // elements between rows
  bool accumulate;          // add to `out`, which is fp32 then
  int threads;
};

// One instruction set's product. The packed panels live in `workspace`, of workspace_bytes(args) bytes at any alignment.
struct GemmKernel {
  std::int64_t (*workspace_bytes)(const GemmArgs& args);
  void (*run)(const GemmArgs& args, void* workspace);
};

// The kernel for inputs of these dtypes, or null where this instruction set has none.
const GemmKernel* gemm_kernel(Isa isa, DType a, DType b);

// Whether the machine multiplies bf16 tiles in hardware (AMX), several times faster than any kernel here.
bool machine_has_amx_bf16();

}  // namespace cpo
