// setup.py compiles this file for the instruction set in its name. vdpbf16ps adds two products of bf16 to an fp32 sum; it
// takes subnormals as zero.
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

struct Bf16PairArithmetic {
  static constexpr int kUnit = 2;

  static bool is_unit(cpo::DType) { return true; }

  static __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

  // One instruction instead of ten. It makes subnormals zero, which sums of vdpbf16ps are already.
  static __m256i sum_to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

  static __m256i to_bf16(__m512 x) {
    constexpr int kSubnormal = 0x20;
    return __builtin_expect(_mm512_fpclass_ps_mask(x, kSubnormal) != 0, 0) ? narrow_to_bf16(x) : sum_to_bf16(x);
  }

  template <int W>
  static void pack(cpo::DType, const PackSource& source, Size units, float* out) {
    ::pack<W, PairSource>(source, units, out);
  }
};

}  // namespace

namespace cpo {

extern const GemmKernel kGemmAvx512Bf16 = {workspace_bytes<TileKernel<Bf16PairArithmetic>>, run<TileKernel<Bf16PairArithmetic>>, shares<TileKernel<Bf16PairArithmetic>>, &kSoftmaxKernels};

}  // namespace cpo
