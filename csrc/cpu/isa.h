// The instruction sets compiled in, and which of them this machine runs.
#pragma once

#include <string>
#include <vector>

#include "cpu/row_args.h"

namespace cpo {

enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16, kNeon };

std::vector<std::string> compiled_isas();   // slowest first
std::vector<std::string> supported_isas();  // those of them that this machine runs, slowest first

// Throws std::invalid_argument, naming the sets there are, for a name that is unknown or not supported here.
Isa parse_isa(const std::string& name);

const RowKernels& row_kernels(Isa isa);

}  // namespace cpo
