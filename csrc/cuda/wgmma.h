// wgmma of 64 x 256 x 16: a warpgroup multiplies shared memory into 128 float32 accumulators a thread.
//
// Thread t holds rows t / 32 * 16 + t % 32 / 4 (even pairs) and 8 further (odd pairs): accumulator 4 j + 2 h + b is row h of these
// two, column 8 j + t % 4 * 2 + b. Included by hopper.h.
#pragma once

#define CPO_ACCUMULATORS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CPO_ACCUMULATORS_16(d, i) \
  CPO_ACCUMULATORS_4(d, i), CPO_ACCUMULATORS_4(d, i + 4), CPO_ACCUMULATORS_4(d, i + 8), CPO_ACCUMULATORS_4(d, i + 12)
#define CPO_ACCUMULATORS(d)                                                                           \
  CPO_ACCUMULATORS_16(d, 0), CPO_ACCUMULATORS_16(d, 16), CPO_ACCUMULATORS_16(d, 32),                  \
      CPO_ACCUMULATORS_16(d, 48), CPO_ACCUMULATORS_16(d, 64), CPO_ACCUMULATORS_16(d, 80),             \
      CPO_ACCUMULATORS_16(d, 96), CPO_ACCUMULATORS_16(d, 112)

namespace cpo::hopper {

// d = a @ b.T, or d += a @ b.T; a (64, 16) and b (256, 16) by their descriptors. Asynchronous: see wgmma_wait.
template <class T>
CPO_DEVICE void wgmma(float (&d)[128], std::uint64_t a, std::uint64_t b, bool accumulate);

template <>
CPO_DEVICE void wgmma<bf16>(float (&d)[128], std::uint64_t a, std::uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, accumulate, 1, 1, 0, 0;\n}\n"
      : CPO_ACCUMULATORS(d)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

template <>
CPO_DEVICE void wgmma<f16>(float (&d)[128], std::uint64_t a, std::uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, accumulate, 1, 1, 0, 0;\n}\n"
      : CPO_ACCUMULATORS(d)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

}  // namespace cpo::hopper

#undef CPO_ACCUMULATORS
#undef CPO_ACCUMULATORS_16
#undef CPO_ACCUMULATORS_4
