// What crosses the border between baseline code and the GEMM compiled per instruction set: plain structs, no inline code.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/softmax_args.h"

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
  DType out_dtype;
  std::int64_t out_stride;  // elements between rows
  std::uint16_t* low;       // (m, n) like a bf16 `out`, or null: the sum is out + low, two bf16 numbers with `out` its rounding
  bool accumulate;          // add to `out`, which is fp32 then, or to out + low
  int threads;
  const SoftmaxArgs* softmax = nullptr;  // what is made of the rows instead of storing them; `out` may be null then, fp32 or bf16
};

// One instruction set's product. The packed panels live in `workspace`, of workspace_bytes(args) bytes at any alignment.
struct GemmKernel {
  std::int64_t (*workspace_bytes)(const GemmArgs& args);
  void (*run)(const GemmArgs& args, void* workspace);
  // Which rows and columns of the result each thread makes, four bounds for each of args.threads at most; returns how many do.
  std::int64_t (*shares)(const GemmArgs& args, std::int64_t* out);
  const SoftmaxKernels* softmax;
};

#if defined(__x86_64__)
extern const GemmKernel kGemmAvx2;        // any dtypes, multiplied in fp32
extern const GemmKernel kGemmAvx512;      // likewise
extern const GemmKernel kGemmAvx512Bf16;  // both inputs bf16
#endif

}  // namespace cpo
