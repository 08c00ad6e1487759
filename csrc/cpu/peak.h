// The most that this machine multiplies and adds: the ceiling that products are held against.
#pragma once

#include "common/dtype.h"

namespace cpo {

// Multiply-adds a second of `threads` threads on registers alone, fp32 sums of fp32 or of bf16 products: the fastest of many
// short runs within about `seconds`. 0 where no vector kernel is compiled in for this machine.
double peak_multiply_adds(DType dtype, int threads, double seconds);

}  // namespace cpo
