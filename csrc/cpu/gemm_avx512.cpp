// setup.py compiles this file for the instruction set in its name. Products in fp32: half precision is widened when packed.
#include "cpu/row_args.h"
#include "cpu/simd_avx512.h"

// Written in terms of the Vec above, so the order matters.
#include "cpu/vec_math.h"

#include "cpu/row_transform.h"

#include "cpu/row_backward.h"
#include "cpu/row_forward.h"

#include "cpu/softmax_rows.h"

#include "cpu/gemm_driver.h"
#include "cpu/gemm_tile_avx512.h"

namespace {

struct Fp32Arithmetic {
  static constexpr int kUnit = 1;

  static bool is_unit(cpo::DType dtype) { return dtype == cpo::DType::kF32; }

  static __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }

  static __m256i to_bf16(__m512 x) { return narrow_to_bf16(x); }
  static __m256i sum_to_bf16(__m512 x) { return narrow_to_bf16(x); }

  template <int W>
  static void pack(cpo::DType dtype, const PackSource& source, Size units, float* out) {
    switch (dtype) {
      case cpo::DType::kF32: return ::pack<W, F32Source>(source, units, out);
      case cpo::DType::kBF16: return ::pack<W, WidenedSource<widen_bf16>>(source, units, out);
      case cpo::DType::kF16: return ::pack<W, WidenedSource<widen_f16>>(source, units, out);
    }
  }
};

}  // namespace

namespace cpo {

extern const GemmKernel kGemmAvx512 = {workspace_bytes<TileKernel<Fp32Arithmetic>>, run<TileKernel<Fp32Arithmetic>>, shares<TileKernel<Fp32Arithmetic>>, &kSoftmaxKernels};

}  // namespace cpo
