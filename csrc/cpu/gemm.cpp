#include "cpu/gemm.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cpo {

#if defined(__x86_64__)
const GemmKernel* gemm_kernel(Isa isa, DType a, DType b) {
  switch (isa) {
    case Isa::kScalar:
    case Isa::kNeon: return nullptr;
    case Isa::kAvx2: return &kGemmAvx2;
    case Isa::kAvx512: return &kGemmAvx512;
    case Isa::kAvx512Bf16: return a == DType::kBF16 && b == DType::kBF16 ? &kGemmAvx512Bf16 : &kGemmAvx512;
  }
  return nullptr;
}

bool machine_has_amx_bf16() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // EDX of leaf 7
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile);
}
#else
const GemmKernel* gemm_kernel(Isa, DType, DType) { return nullptr; }

bool machine_has_amx_bf16() { return false; }
#endif

}  // namespace cpo
