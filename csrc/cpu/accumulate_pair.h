#pragma once

#include <cstdint>

namespace cpo {

// high + low += term, elementwise over n: two bfloat16 numbers hold a sum with 16 bits more than one. `high` is at all times the
// sum rounded to bfloat16. `term` is float32, or bfloat16 if term_is_bf16.
void accumulate_pair(std::uint16_t* high, std::uint16_t* low, const void* term, bool term_is_bf16, std::int64_t n, int threads);

}  // namespace cpo
